"""One request's way through the engine: events in, an answer or a stream of chunks out.

Each of the two APIs is a collector: told an event, it returns the choices of the next chunk (perhaps none) and
remembers what the whole answer needs, so that an answer says the same streamed and not.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from hetero_glm5.core import QueueFull, RequestError, TokenEvent
from hetero_glm5.server.errors import GenerationFailed, bug_body, describe
from hetero_glm5.server.parsers import Delta, OutputParser, ParsedMessage
from hetero_glm5.server.responses import (
    DONE,
    PING,
    Answer,
    Usage,
    chat_choice,
    chat_chunk_choice,
    chat_delta,
    event,
    text_choice,
)
from hetero_glm5.server.worker import Generation

log = logging.getLogger(__name__)

SILENCE = 10.0  # seconds after which a stream says that it is alive; some clients give up after 20


class Collector(Protocol):
    usage: Usage

    def opening(self) -> list[dict[str, Any]]:
        """Choices of chunks to send before anything has been computed."""
        ...

    def tell(self, index: int, told: TokenEvent) -> list[dict[str, Any]]:
        """Choices of the chunks that say what this event brought."""
        ...

    def choices(self) -> list[dict[str, Any]]:
        """The whole answer's choices, after the last event."""
        ...


class TextCollector:
    """/v1/completions: one choice for each prompt."""

    def __init__(self, prompts: list[list[int]]):
        self.usage = Usage(sum(map(len, prompts)))
        self._texts = [""] * len(prompts)
        self._reasons: list[str | None] = [None] * len(prompts)

    def opening(self) -> list[dict[str, Any]]:
        return []

    def tell(self, index: int, told: TokenEvent) -> list[dict[str, Any]]:
        self.usage.completion += told.token is not None
        self.usage.cached += _newly_cached(told)
        self._texts[index] += told.text
        self._reasons[index] = told.finish_reason
        return [text_choice(index, told.text, told.finish_reason)] if told.text or told.finish_reason else []

    def choices(self) -> list[dict[str, Any]]:
        return [text_choice(i, *pair) for i, pair in enumerate(zip(self._texts, self._reasons, strict=True))]


class ChatCollector:
    """/v1/chat/completions: one choice, parsed into reasoning, content and tool calls."""

    def __init__(self, prompt: list[int], parser: OutputParser, *, counts_reasoning: bool):
        self.usage = Usage(len(prompt), reasoning=0 if counts_reasoning else None)
        self._parser, self._message, self._reason = parser, ParsedMessage(), "stop"

    def opening(self) -> list[dict[str, Any]]:
        return [chat_chunk_choice({"role": "assistant", "content": ""})]

    def tell(self, index: int, told: TokenEvent) -> list[dict[str, Any]]:
        self.usage.cached += _newly_cached(told)
        if told.token is not None:
            self.usage.completion += 1
            if self.usage.reasoning is not None and self._parser.in_reasoning:
                self.usage.reasoning += 1
        deltas = self._parser.feed(told.text)
        if told.finish_reason is not None:
            deltas += self._parser.finish()
        self._message.add(deltas)
        choices = [chat_chunk_choice(chat_delta(delta)) for delta in _merged(deltas)]
        if told.finish_reason is not None:
            called = told.finish_reason == "stop" and self._parser.num_calls > 0
            self._reason = "tool_calls" if called else told.finish_reason
            choices.append(chat_chunk_choice({}, self._reason))
        return choices

    def choices(self) -> list[dict[str, Any]]:
        return [chat_choice(self._message, self._reason)]


def _newly_cached(told: TokenEvent) -> int:
    """Of the sequence's prompt, how many tokens were known, told once: when it ends."""
    return (told.seq.num_cached or 0) if told.finish_reason is not None else 0


def _merged(deltas: list[Delta]) -> list[Delta]:
    """Neighbouring deltas that extend the same text, as one."""
    merged: list[Delta] = []
    for delta in deltas:
        last = merged[-1] if merged else None
        if last is not None and last.kind == delta.kind != "name" and last.call == delta.call:
            merged[-1] = Delta(delta.kind, last.text + delta.text, delta.call)
        else:
            merged.append(delta)
    return merged


async def stream(
    generation: Generation, collector: Collector, answer: Answer, *, include_usage: bool
) -> AsyncIterator[bytes]:
    """The server-sent events of an answer. An error after the first byte is an event, and the last one."""
    sent = time.monotonic()
    try:
        for choice in collector.opening():
            yield answer.chunk([choice])
        async for item in generation.events(SILENCE / 4):
            chunks = [] if item is None else [answer.chunk([choice]) for choice in collector.tell(*item)]
            if not chunks and time.monotonic() - sent >= SILENCE:
                chunks = [PING]
            for chunk in chunks:
                yield chunk
                sent = time.monotonic()
        if include_usage:
            yield answer.usage_chunk(collector.usage)
        yield DONE
    except (GenerationFailed, RequestError, QueueFull) as error:
        yield event(describe(error)[1])
    except Exception as error:  # a bug: the client hears of it instead of a cut connection
        log.exception("a stream failed")
        yield event(bug_body(error))


class EventStream(StreamingResponse):
    """A stream that closes its generation however it ends, even before its first event."""

    def __init__(self, chunks: AsyncIterator[bytes], close: Callable[[], None]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(chunks, media_type="text/event-stream", headers=headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def collect(generation: Generation, collector: Collector, answer: Answer) -> dict[str, Any]:
    """The whole answer. Raises GenerationFailed."""
    async for item in generation.events():
        if item is not None:
            collector.tell(*item)
    return answer.whole(collector.choices(), collector.usage)


T = TypeVar("T")


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None when the client went away first, which cancels it."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        watching.cancel()
