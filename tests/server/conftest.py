"""A scripted engine, and servers and workers around it."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import httpx
import pytest
import uvicorn

from hetero_glm5.config import ServerConfig
from hetero_glm5.core import LoadProgress, QueueFull, RequestError, SamplingParams, Sequence, TokenEvent
from hetero_glm5.demo.chat_template import CHAT_TEMPLATE
from hetero_glm5.demo.tokenizer import build_tokenizer
from hetero_glm5.server.api import Service, create_app
from hetero_glm5.server.chat_template import ChatTemplate
from hetero_glm5.server.tokenizer import SamplingDefaults, Tokenizer
from hetero_glm5.server.worker import EngineWorker


class FakeEngine:
    """Says `answer(prompt)` piece by piece, one for each step; " w" + the prompt's length + the count by default."""

    context_length = 1000
    num_waiting = 0
    config = SimpleNamespace(max_queued_requests=100)

    def __init__(self, answer: Callable[[list[int]], list[str]] | None = None, *, most_waiting: int = 1000):
        self.answer = answer or (lambda prompt: [f" w{len(prompt)}.{i}" for i in range(200)])
        self.most_waiting = most_waiting
        self.running: dict[Sequence, list[str]] = {}
        self.aborted: list[Sequence] = []
        self.params: list[SamplingParams] = []
        self.closed = False
        self.before_step: Callable[[], None] = lambda: None  # tests put delays and failures here

    @property
    def busy(self) -> bool:
        return bool(self.running)

    @property
    def num_running(self) -> int:
        return len(self.running)

    def add_all(self, tokens: list[int], params: SamplingParams, timeout: float | None) -> list[Sequence]:
        return [self.add(tokens, params)]

    def add(self, tokens: list[int], params: SamplingParams) -> Sequence:
        if len(tokens) >= self.context_length:
            raise RequestError(f"the prompt has {len(tokens)} tokens; the context length is 1000.", "prompt")
        if len(self.running) >= self.most_waiting:
            raise QueueFull("the queue is full.")
        seq = Sequence(list(tokens), params, len(tokens))
        self.running[seq] = self.answer(tokens)[: params.max_tokens]
        self.params.append(params)
        return seq

    def abort(self, seq: Sequence) -> None:
        if self.running.pop(seq, None) is not None:
            self.aborted.append(seq)

    def fail_step(self, message: str) -> list[TokenEvent]:
        failed = list(self.running)
        for seq in failed:
            self.abort(seq)
        return [TokenEvent(seq, None, "", "error", message) for seq in failed]

    def step(self) -> list[TokenEvent]:
        self.before_step()
        events = []
        for seq, pieces in list(self.running.items()):
            seq.tokens.append(1)
            left = len(pieces) - seq.num_output
            reason = None if left else "length" if seq.num_output == seq.params.max_tokens else "stop"
            events.append(TokenEvent(seq, 1, pieces[seq.num_output - 1], reason))
            if reason:
                del self.running[seq]
        return events

    def close(self) -> None:
        self.closed = True


class Served:
    """A running server: `http` is a client for it."""

    def __init__(self, url: str, worker: EngineWorker, server: uvicorn.Server):
        self.url, self.worker, self.server = url, worker, server
        self.http = httpx.Client(base_url=url, timeout=20)

    def chunks(self, route: str, **body) -> list[str]:
        """The data of each event of a stream."""
        with self.http.stream("POST", route, json={**body, "stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            return [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(build_tokenizer(600), ChatTemplate({"default": CHAT_TEMPLATE}, {}, "test"))


@contextmanager
def running_server(load, tokenizer: Tokenizer, config: ServerConfig, wait: bool) -> Iterator[Served]:
    worker = EngineWorker(load, watchdog_timeout=config.watchdog_timeout)
    app = create_app(Service(worker, tokenizer, "tiny", config, SamplingDefaults()))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    served = Served(f"http://127.0.0.1:{listening.getsockname()[1]}", worker, server)
    try:
        while wait and worker.state == "loading":
            time.sleep(0.005)
        yield served
    finally:
        served.http.close()
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server does not stop"


@pytest.fixture
def serve(tokenizer):
    """serve(engine, **flags) starts a server around an engine, or around a load function, and returns it."""
    with ExitStack() as stack:

        def start(engine=None, *, wait: bool = True, **flags) -> Served:
            engine = engine or FakeEngine()
            load = engine if callable(engine) else lambda progress: engine
            return stack.enter_context(running_server(load, tokenizer, ServerConfig(**flags), wait))

        yield start


@pytest.fixture
def fake_engine() -> type[FakeEngine]:
    return FakeEngine


@pytest.fixture
def halfway() -> LoadProgress:
    return LoadProgress("reading experts", 2_000_000_000, 6_000_000_000, 4.0)
