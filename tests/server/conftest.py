"""A scripted engine, and servers around it."""

from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from served import Served, running_server

from hetero_glm5.config import ServerConfig
from hetero_glm5.core import Grammar, LoadProgress, PromptTooLong, QueueFull, SamplingParams, Sequence, TokenEvent
from hetero_glm5.demo.chat_template import CHAT_TEMPLATE
from hetero_glm5.demo.tokenizer import build_tokenizer
from hetero_glm5.server.chat_template import ChatTemplate
from hetero_glm5.server.tokenizer import Tokenizer


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
        self.salts: list[str | None] = []
        self.closed = False
        # Tests put delays and failures here.
        self.before_step: Callable[[], None] = lambda: None
        self.before_compiling: Callable[[Grammar], None] = lambda grammar: None

    @property
    def busy(self) -> bool:
        return bool(self.running)

    @property
    def num_running(self) -> int:
        return len(self.running)

    def add_all(
        self, tokens: list[int], params: SamplingParams, *, salt: str | None, timeout: float | None
    ) -> list[Sequence]:
        self.salts.append(salt)
        return [self.add(tokens, params) for _ in range(params.n)]

    def add(self, tokens: list[int], params: SamplingParams) -> Sequence:
        if len(tokens) >= self.context_length:
            raise PromptTooLong(f"the maximum context length is 1000 tokens; the prompt has {len(tokens)}.", "prompt")
        if len(self.running) >= self.most_waiting:
            raise QueueFull("the queue is full.")
        seq = Sequence(list(tokens), params, len(tokens))
        self.running[seq] = self.answer(tokens)[: params.max_tokens]
        self.params.append(params)
        return seq

    def compile(self, grammar: Grammar) -> None:
        self.before_compiling(grammar)

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


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(build_tokenizer(600), ChatTemplate({"default": CHAT_TEMPLATE}, {}, "test"))


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
