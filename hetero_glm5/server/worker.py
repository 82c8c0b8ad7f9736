"""The engine's thread, and how requests on the event loop reach it.

The engine thread owns the engine: it loads it, then obeys commands, steps, and hands each step's events to the loop in
one call. Everything else here belongs to the loop's thread. A third thread compiles grammars, one at a time, for cores
are scarce. A fourth watches: when the engine is busy and has finished no step for too long, nobody waits for it any
more.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import queue
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Literal

from hetero_glm5.core import LoadProgress, QueueFull, RequestError, SamplingParams, Sequence, TokenEvent, UserError
from hetero_glm5.server.errors import GenerationFailed, NotReady

log = logging.getLogger(__name__)

# A failing step ends the requests that it computed; the others go on. Is the device lost, or were it those requests?
# After MAX_FAILURES failing steps in a row no new request is let in. What is left either succeeds, and all is well, or
# fails and ends too; then the engine is idle and computes one token of a prompt that no client wrote. Only if that
# fails does the server end: no request, however often it is sent, can end it, and a lost device always does.
MAX_FAILURES = 3

NAMELESS: frozenset[str] = frozenset()

State = Literal["loading", "ready", "failed"]
Report = Callable[[LoadProgress], None]


class Generation:
    """The answers to one request's prompts, as they come. Made by EngineWorker.submit. `names`: what clients call it.
    Times are time.monotonic()'s; `first` and `last` are those of tokens."""

    def __init__(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        salt: str | None = None,
        names: frozenset[str] = NAMELESS,
    ):
        self.prompts, self.params = prompts, params  # each prompt is answered params.n times, one after the other
        self.salt, self.names = salt, names
        self.submitted = time.monotonic()
        self.first: float | None = None
        self.last: float | None = None
        self.queue: asyncio.Queue[tuple[int, TokenEvent] | Exception | None] = asyncio.Queue()
        self.unfinished = len(prompts) * params.n
        self.compiled: Future[None] = Future()  # the grammar
        self.compiled.set_result(None)

    async def next(self, patience: float | None) -> tuple[int, TokenEvent] | None:
        """(answer's number, event); None for "accepted", or when `patience` seconds brought nothing.

        Raises RequestError, QueueFull or GenerationFailed.
        """
        loop = asyncio.get_running_loop()
        timer = loop.call_later(patience, self.queue.put_nowait, None) if patience else None
        try:
            item = await self.queue.get()
        finally:
            if timer is not None:
                timer.cancel()
        if isinstance(item, Exception):
            raise item
        return item

    async def events(self, patience: float | None = None) -> AsyncIterator[tuple[int, TokenEvent] | None]:
        """(answer's number, event) until every answer is finished; None now and then, at the latest after `patience`
        seconds without an event. Raises like next()."""
        while self.unfinished:
            item = await self.next(patience)
            if item is not None:
                if item[1].finish_reason == "error":
                    raise GenerationFailed(item[1].error)
                self.unfinished -= item[1].finish_reason is not None
            yield item


class EngineWorker:
    """`load` makes the engine, given a callback for progress. `on_ready` and `on_failure` are called on the loop.
    `observe`, an attribute to set, is too: with each event, before it is handed on."""

    def __init__(
        self,
        load: Callable[[Report], Any],
        *,
        watchdog_timeout: float,
        request_timeout: float | None = None,
        on_progress: Report = lambda progress: None,
        on_ready: Callable[[], None] = lambda: None,
        on_failure: Callable[[], None] = lambda: None,
    ):
        self._load, self._timeout, self._request_timeout = load, watchdog_timeout, request_timeout
        self._on_progress, self._on_ready, self._on_failure = on_progress, on_ready, on_failure
        self.observe: Callable[[Generation, int, TokenEvent], None] = lambda generation, index, event: None
        self.state: State = "loading"
        self.failure: str | None = None
        self.progress = LoadProgress("starting")
        self.context_length = self.max_queued = 0
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._sequences: dict[Sequence, tuple[Generation, int]] = {}  # the engine thread's
        self._generations: set[Generation] = set()  # the loop's
        self._answers: set[asyncio.Future[Any]] = set()  # that ask() waits for; the loop's
        self._stopping = False
        self._busy_since: float | None = None  # when the step in progress began
        self._failures = 0  # steps in a row that raised; the engine thread's
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._compiler = ThreadPoolExecutor(1, "grammars")

    # On the loop's thread.

    def start(self) -> None:
        """Starts loading. Call it on the loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    async def stop(self) -> None:
        """Finishes what was submitted and closes the engine. An engine that is still loading is left behind."""
        await asyncio.to_thread(self._compiler.shutdown)
        self._commands.put(self._set_stopping)
        while self.state == "ready" and self.alive:  # no join: an engine that hangs is given up by the watchdog
            await asyncio.sleep(0.01)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread still runs."""
        return self._thread.is_alive()

    @property
    def busy(self) -> bool:
        """Whether the engine computes, or has been asked to."""
        return self.state == "ready" and (bool(self._sequences) or not self._commands.empty())

    @property
    def num_open(self) -> int:
        return len(self._generations)

    async def submit(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        patience: float | None = None,
        *,
        salt: str | None = None,
        names: frozenset[str] = NAMELESS,
    ) -> Generation:
        """Hands prompts to the engine, all or none, and waits for its word, at most `patience` seconds: the engine
        listens between two steps, and a step may be long. Close the generation when done with it, finished or not.
        Prefixes are shared among generations of one `salt`; each of `names` stands for this one in abort().

        Raises NotReady, RequestError, QueueFull or GenerationFailed; the last three may also come with the events.
        """
        self._check_ready()
        generation = Generation(prompts, params, salt, names)
        if params.grammar is not None:
            waiting = sum(not other.compiled.done() for other in self._generations)
            if waiting >= self.max_queued:
                raise QueueFull(
                    f"the grammars of {waiting} requests are to be compiled, the limit of --max-queued-requests. "
                    "Try again later."
                )
            generation.compiled = self._compiler.submit(self._engine.compile, params.grammar)
        self._generations.add(generation)
        self._order(self._add, generation)
        try:
            await generation.next(patience)
        except BaseException:  # also when cancelled
            self.close(generation)
            raise
        return generation

    def close(self, generation: Generation) -> None:
        """Nobody listens any more: what is unfinished is aborted."""
        self._generations.discard(generation)
        generation.compiled.cancel()
        if generation.unfinished:
            self._order(self._abort, generation)

    def abort(self, name: str | None) -> int:
        """Ends the generations of that name, or all; their listeners hear of it. How many there were."""
        ended = [g for g in self._generations if g.unfinished and (name is None or name in g.names)]
        for generation in ended:
            self._order(self._abort, generation)
        return len(ended)

    async def ask(self, question: Callable[[Any], Any]) -> Any:
        """Calls question(engine) on the engine's thread, between two steps, and returns what that returns.

        Raises NotReady, what a question raises as a RequestError, and anything else as GenerationFailed.
        """
        self._check_ready()
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._answers.add(answer)
        self._commands.put(lambda: self._answer(question, answer))
        try:
            return await answer
        finally:
            self._answers.discard(answer)

    def _order(self, command: Callable[[Generation], None], generation: Generation) -> None:
        """Has the engine's thread call command(generation), when its grammar is compiled."""
        generation.compiled.add_done_callback(lambda _: self._commands.put(partial(command, generation)))

    def _check_ready(self) -> None:
        if self.state != "ready":
            raise NotReady(self.failure or "The model is still loading; see /health.")

    def _fail_all(self, message: str) -> None:
        for generation in self._generations:
            generation.queue.put_nowait(GenerationFailed(message))
        for answer in self._answers:
            _settle(answer, GenerationFailed(message))

    def _deliver(self, told: list[tuple[Generation, int, TokenEvent]]) -> None:
        now = time.monotonic()
        for generation, index, event in told:
            self.observe(generation, index, event)
            if event.token is not None:
                generation.first, generation.last = generation.first or now, now
            generation.queue.put_nowait((index, event))

    def _ready(self) -> None:
        self.state = "ready"
        self._on_ready()

    def _die(self, message: str) -> None:
        if self.failure is None:
            self.state, self.failure = "failed", message
            self._fail_all(message)
            self._on_failure()

    # On the engine's thread.

    def _run(self) -> None:
        try:
            self._engine = self._load(self._report)
        except UserError as error:
            self._call(self._die, str(error))
            return
        except Exception as error:  # the thread ends here: the server must hear of it
            if not isinstance(error, OSError | MemoryError):
                log.exception("loading failed")
            self._call(self._die, f"Loading failed: {type(error).__name__}: {error}")
            return
        self.context_length = self._engine.context_length
        self.max_queued = self._engine.config.max_queued_requests
        self._call(self._ready)
        try:
            self._serve()
            self._engine.close()
        except Exception as error:  # the thread ends here: clients must hear of it
            log.exception("the engine ended")
            self._call(self._die, f"The engine ended: {type(error).__name__}: {error}")

    def _serve(self) -> None:
        while not self._stopping or self._engine.busy:
            if self._failures < MAX_FAILURES:
                self._obey()
            elif not self._engine.busy:
                self._probe()
            if self._engine.busy:
                self._step()

    def _probe(self) -> None:
        """Tries one token of a prompt that no client wrote. Raises what the engine raises."""
        self._busy_since = time.monotonic()
        probe = self._engine.add([0], SamplingParams(max_tokens=1))
        self._engine.step()
        self._engine.abort(probe)
        self._busy_since = None
        log.warning("%d steps in a row failed, but the device works: their requests were to blame", self._failures)
        self._failures = 0

    def _obey(self) -> None:
        """Runs every waiting command; without work for the engine, waits for one first."""
        if not self._engine.busy:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _step(self) -> None:
        self._busy_since = time.monotonic()
        try:
            events = self._engine.step()
            self._failures = 0
        except Exception as error:  # a step fails its requests, not the server
            log.exception("a step failed")
            self._failures += 1
            events = self._engine.fail_step(
                f"The engine failed while computing this request: {type(error).__name__}: {error}"
            )
            if not events and self._failures >= MAX_FAILURES:  # no request can be ended for it, again and again
                raise
        finally:
            self._busy_since = None
        told = [(*self._sequences[event.seq], event) for event in events]
        for event in events:
            if event.finish_reason is not None:
                del self._sequences[event.seq]
        if told:
            self._call(self._deliver, told)
        if (self._engine.num_running or self._engine.num_waiting) and not self._sequences:
            raise RuntimeError("it still has work after its requests were aborted")

    def _add(self, generation: Generation) -> None:
        added: list[Sequence] = []
        answer: Exception | None = None
        try:
            generation.compiled.result()
            for tokens in generation.prompts:
                added += self._engine.add_all(
                    tokens, generation.params, salt=generation.salt, timeout=self._request_timeout
                )
        except Exception as error:  # one request's failure is not the others'
            answer = _told(error)
            for seq in added:
                self._engine.abort(seq)
        else:
            self._sequences |= {seq: (generation, index) for index, seq in enumerate(added)}
        self._call(generation.queue.put_nowait, answer)

    def _abort(self, generation: Generation) -> None:
        aborted = {seq: index for seq, (owner, index) in self._sequences.items() if owner is generation}
        for seq in aborted:
            del self._sequences[seq]
            self._engine.abort(seq)
        self._call(self._deliver, [(generation, i, TokenEvent(seq, None, "", "abort")) for seq, i in aborted.items()])

    def _answer(self, question: Callable[[Any], Any], answer: asyncio.Future[Any]) -> None:
        try:
            found = question(self._engine)
        except Exception as error:  # it is the asker's
            found = _told(error)
        self._call(_settle, answer, found)

    def _set_stopping(self) -> None:
        self._stopping = True

    def _report(self, progress: LoadProgress) -> None:
        self.progress = progress
        self._on_progress(progress)

    # On any thread.

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        """Runs `function` on the loop, unless the loop has ended."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    def _watch(self) -> None:
        while self._thread.is_alive():
            time.sleep(min(1.0, self._timeout / 4))
            since = self._busy_since
            if since is not None and time.monotonic() - since > self._timeout:
                faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
                message = f"The engine finished no step for {self._timeout:g} s (--watchdog-timeout); giving up."
                self._call(self._die, message)
                return


def _told(error: Exception) -> Exception:
    """How a client hears of it."""
    if isinstance(error, RequestError | QueueFull):
        return error
    return GenerationFailed(f"The engine failed: {type(error).__name__}: {error}")


def _settle(answer: asyncio.Future[Any], found: Any) -> None:
    if answer.done():  # nobody waits any more
        return
    if isinstance(found, Exception):
        answer.set_exception(found)
    else:
        answer.set_result(found)
