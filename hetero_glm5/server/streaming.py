"""One request's way through the engine: events in, an answer or a stream of chunks out.

Each API is a collector (collectors.py): told an event, it returns the choices of the next chunk (perhaps none) and
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
from hetero_glm5.server.responses import DONE, PING, Usage, event
from hetero_glm5.server.worker import Generation

log = logging.getLogger(__name__)

SILENCE = 10.0  # seconds after which a stream says that it is alive; some clients give up after 20


class Collector(Protocol):
    usage: Usage

    def opening(self) -> list[dict[str, Any]]:
        """Choices of chunks to send before anything has been computed."""
        ...

    def tell(self, index: int, told: TokenEvent) -> list[dict[str, Any]]:
        """Choices of the chunks that say what this event brought. index: the answer's; a prompt's answers are
        neighbours."""
        ...

    def choices(self) -> list[dict[str, Any]]:
        """The whole answer's choices, after the last event."""
        ...


class Shape(Protocol):
    """How an API spells an answer: responses.Answer, or like it."""

    def whole(self, choices: list[dict[str, Any]], usage: Usage, timings: dict[str, float]) -> Any: ...

    def chunk(self, choices: list[dict[str, Any]]) -> bytes: ...

    def usage_chunk(self, usage: Usage, timings: dict[str, float]) -> bytes: ...


async def stream(
    generation: Generation, collector: Collector, answer: Shape, *, include_usage: bool
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
            yield answer.usage_chunk(collector.usage, timings(generation, collector.usage))
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


async def collect(generation: Generation, collector: Collector, answer: Shape) -> Any:
    """The whole answer. Raises GenerationFailed."""
    async for item in generation.events():
        if item is not None:
            collector.tell(*item)
    return answer.whole(collector.choices(), collector.usage, timings(generation, collector.usage))


def timings(generation: Generation, usage: Usage) -> dict[str, float]:
    """Counts, milliseconds and rates in llama.cpp's names. The prompt's time runs from the request to the first token,
    waiting included; the prediction's from the first token to the last, and its rates are those of the others."""
    first, last = generation.first or generation.submitted, generation.last or generation.submitted
    computed, further = usage.prompt - usage.cached, max(usage.completion - 1, 0)
    times = {"cache_n": usage.cached, "prompt_n": computed} | _rates("prompt", computed, first - generation.submitted)
    return times | {"predicted_n": usage.completion} | _rates("predicted", further, last - first)


def _rates(name: str, count: int, seconds: float) -> dict[str, float]:
    return {
        f"{name}_ms": seconds * 1e3,
        f"{name}_per_token_ms": seconds * 1e3 / count if count else 0.0,
        f"{name}_per_second": count / seconds if seconds > 0 else 0.0,
    }


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
