"""One request's way through the engine: events in, an answer or a stream of server-sent events out.

Each API has a teller, which is told an event, returns what the stream says of it and remembers what the whole answer
needs, so that an answer says the same streamed and not. Those of completions, chats and /generate are told by a
collector (collectors.py), those of agents' APIs are in turn.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from hetero_glm5.core import QueueFull, RequestError, TokenEvent
from hetero_glm5.server.errors import GenerationFailed, bug_body, describe
from hetero_glm5.server.responses import DONE, PING, Usage, event, json_response
from hetero_glm5.server.worker import EngineWorker, Generation

log = logging.getLogger(__name__)

SILENCE = 10.0  # seconds after which a stream says that it is alive; some clients give up after 20


def patience() -> float:
    """Seconds for the engine to refuse a request; then streams' headers go out, and who leaves is noticed."""
    return SILENCE / 10


class Teller(Protocol):
    """An answer in an API's words. A stream is what opening, each tell and closing return."""

    ping: bytes

    def opening(self) -> list[bytes]:
        """Before anything has been computed."""
        ...

    def tell(self, index: int, told: TokenEvent) -> Iterable[bytes]:
        """index: the answer's; a prompt's answers are neighbours. Events are spelled as they are asked for."""
        ...

    def closing(self) -> list[bytes]: ...

    def failed(self, error: dict[str, Any]) -> bytes:
        """The last event of a stream that cannot go on; `error` is OpenAI's."""
        ...

    def whole(self) -> Any:
        """The answer that is not streamed, after the last event."""
        ...


async def reply(
    request: Request, worker: EngineWorker, generation: Generation, teller: Teller, streams: bool
) -> Response:
    """The answer when it is complete, or a stream of it. Raises GenerationFailed."""
    if streams:
        return EventStream(_stream(generation, teller), lambda: worker.close(generation))
    try:
        whole = await unless_disconnected(request, _collect(generation, teller))
    finally:
        worker.close(generation)
    return Response(status_code=499) if whole is None else json_response(whole)


async def _collect(generation: Generation, teller: Teller) -> Any:
    async for item in generation.events():
        if item is not None:
            teller.tell(*item)
            await asyncio.sleep(0)  # many events may have come: other requests go on between them
    return teller.whole()


async def _stream(generation: Generation, teller: Teller) -> AsyncIterator[bytes]:
    """An error after the first byte is an event, and the last one."""
    sent = time.monotonic()
    try:
        for line in teller.opening():
            yield line
        async for item in generation.events(SILENCE / 4):
            lines = [] if item is None else [*teller.tell(*item)]
            if not lines and time.monotonic() - sent >= SILENCE:
                lines = [teller.ping]
            for line in lines:
                yield line
                sent = time.monotonic()
            await asyncio.sleep(0)  # sending waits only for a client that is slow
        for line in teller.closing():
            yield line
    except (GenerationFailed, RequestError, QueueFull) as error:
        yield teller.failed(describe(error)[1]["error"])
    except Exception as error:  # a bug: the client hears of it instead of a cut connection
        log.exception("a stream failed")
        yield teller.failed(bug_body(error)["error"])


class Collector(Protocol):
    usage: Usage

    def opening(self) -> list[dict[str, Any]]:
        """Choices of chunks to send before anything has been computed."""
        ...

    def tell(self, index: int, told: TokenEvent) -> Iterable[dict[str, Any]]:
        """Choices of the chunks that say what this event brought, spelt as they are asked for."""
        ...

    def choices(self) -> list[dict[str, Any]]:
        """The whole answer's choices, after the last event."""
        ...


class Shape(Protocol):
    """How an API spells an answer: responses.Answer, or like it."""

    def whole(self, choices: list[dict[str, Any]], usage: Usage, timings: dict[str, float]) -> Any: ...

    def chunk(self, choices: list[dict[str, Any]]) -> bytes: ...

    def usage_chunk(self, usage: Usage, timings: dict[str, float]) -> bytes: ...


class ChoicesTeller:
    """The teller of a collector's choices."""

    ping = PING

    def __init__(self, generation: Generation, collector: Collector, answer: Shape, *, include_usage: bool = False):
        self._generation, self._collector, self._answer = generation, collector, answer
        self._include_usage = include_usage

    def opening(self) -> list[bytes]:
        return [self._answer.chunk([choice]) for choice in self._collector.opening()]

    def tell(self, index: int, told: TokenEvent) -> Iterable[bytes]:
        return (self._answer.chunk([choice]) for choice in self._collector.tell(index, told))

    def closing(self) -> list[bytes]:
        return [self._answer.usage_chunk(*self._costs()), DONE] if self._include_usage else [DONE]

    def failed(self, error: dict[str, Any]) -> bytes:
        return event({"error": error})

    def whole(self) -> Any:
        return self._answer.whole(self._collector.choices(), *self._costs())

    def _costs(self) -> tuple[Usage, dict[str, float]]:
        return self._collector.usage, timings(self._generation, self._collector.usage)


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
