"""The nouns everyone shares: what a request asks for, what a sequence is, what a step computes, what comes out.

Nothing here knows torch, threads or files.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

MOST_STOPS, MOST_STOP_CHARACTERS, MOST_STOP_IDS = 64, 1000, 1024

FinishReason = Literal["stop", "length", "abort", "error"]


class UserError(ValueError):
    """Something the user can mend. The message is whole sentences: the value, the limit, the remedy."""


class RequestError(UserError):
    """One request cannot be served (HTTP 400). `param` names the offending field."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class QueueFull(UserError):
    """The waiting line is full (HTTP 429)."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    temperature 0 is greedy. top_p in (0, 1]; top_k 0 means off. `seed` makes the draw reproducible whatever else is in
    the batch; without one a sequence draws from a seed of its own. `max_tokens` None means "up to the context length".
    Raises RequestError naming the field.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name, value, kind in (("stop", stop, str), ("stop_token_ids", self.stop_token_ids, int)):
            if not isinstance(value, list | tuple) or any(type(v) is not kind for v in value):
                raise RequestError(f"{name} is {value!r}; it must be a list of {kind.__name__}.", name)
            object.__setattr__(self, name, tuple(value))
        for name, optional in (("max_tokens", True), ("seed", True), ("top_k", False), ("min_tokens", False)):
            value = getattr(self, name)
            self._check(name, type(value) is int or (optional and value is None), "a whole number")
        for name in ("temperature", "top_p"):
            self._check(name, type(getattr(self, name)) in (int, float), "a number")
        self._check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        self._check("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100")
        self._check("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1")
        self._check("top_k", self.top_k >= 0, "at least 0 (0 means off)")
        most = "max_tokens" if self.max_tokens is not None else "any number"
        fits = self.max_tokens is None or self.min_tokens <= self.max_tokens
        self._check("min_tokens", self.min_tokens >= 0 and fits, f"between 0 and {most}")
        self._check("seed", self.seed is None or 0 <= self.seed < 2**64, "between 0 and 2**64 - 1")
        if len(self.stop) > MOST_STOPS or any(not 1 <= len(s) <= MOST_STOP_CHARACTERS for s in self.stop):
            raise RequestError(
                f"stop has {len(self.stop)} strings; at most {MOST_STOPS} of 1 to {MOST_STOP_CHARACTERS} characters "
                "can be used.",
                "stop",
            )
        if len(self.stop_token_ids) > MOST_STOP_IDS:
            raise RequestError(
                f"stop_token_ids has {len(self.stop_token_ids)} ids; at most {MOST_STOP_IDS} can be used.",
                "stop_token_ids",
            )

    def _check(self, name: str, ok: bool, limit: str) -> None:
        if not ok:  # NaN fails every comparison and lands here too
            raise RequestError(f"{name} is {getattr(self, name)!r}; it must be {limit}.", name)


@dataclass(frozen=True)
class Drawn:
    """A token that was drawn, and, if the request asks, its log-probability (natural logarithm, of the unmodified
    logits) and the likeliest tokens' beside it, best first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Sequence:
    """One prompt and what has been generated for it. State is `tokens`, `num_computed` and `pages`; the rest follows.

    Invariant: the KV cache holds exactly tokens[:num_computed], in `pages`, oldest first.
    """

    tokens: list[int]
    params: SamplingParams
    num_prompt: int
    id: int = -1  # its place in the order of arrival, from the scheduler
    salt: str | None = None  # prefixes are shared among sequences of one salt only
    deadline: float | None = None  # by time.monotonic()
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    drafts: tuple[int, ...] = ()  # tokens that may follow
    num_cached: int | None = None  # tokens of the prompt that need not be computed, known when it is first let in
    finish_reason: FinishReason | None = None
    logits: list[Any] | None = None  # where to collect the logits of every position, if asked for (LLM.logits)
    prompt_logprobs: list[Drawn] | None = None  # of tokens[1:num_prompt], if asked for
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        self.seed = secrets.randbits(64) if self.params.seed is None else self.params.seed

    @property
    def num_pending(self) -> int:
        """Tokens whose keys are not in the cache yet; one of them while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def decoding(self) -> bool:
        return self.num_pending == 1 and self.num_output > 0

    @property
    def reads_prompt(self) -> bool:
        """Whether something is wanted of every position of the prompt, so that all of it must be computed."""
        return self.logits is not None or self.prompt_logprobs is not None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class Chunk:
    """`count` consecutive tokens of one sequence, starting at its num_computed, that a step computes, and after them
    the tokens drafted to follow."""

    seq: Sequence
    count: int
    drafts: tuple[int, ...] = ()

    @property
    def start(self) -> int:
        return self.seq.num_computed

    @property
    def num_rows(self) -> int:
        return self.count + len(self.drafts)

    @property
    def decodes(self) -> bool:
        """Whether it is the one token that was drawn last; else it is part of a prefill."""
        return self.seq.decoding

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the sequence's last token, so that a new one is drawn from its logits."""
        return self.count == self.seq.num_pending

    @property
    def num_draws(self) -> int:
        """How many of its rows draw a token, the last ones: row j assumes that the first j drafts are right."""
        return 1 + len(self.drafts) if self.samples else 0


@dataclass(frozen=True)
class SlotCopy:
    """The first `count` cached tokens of page `source` are wanted in page `target` too."""

    source: int
    target: int
    count: int


@dataclass(frozen=True)
class Batch:
    """What one step computes: decode rows first, then prefill chunks. Before that, pages get what is known of them:
    first `restored` ones a whole page's bytes (uint8 array), then `copies`."""

    chunks: list[Chunk]
    restored: list[tuple[int, Any]] = field(default_factory=list)
    copies: list[SlotCopy] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.chunks or self.restored or self.copies)


@dataclass(frozen=True)
class TokenEvent:
    """What a step tells about one sequence. `text` is new text that no stop string can take back any more."""

    seq: Sequence
    token: int | None
    text: str
    finish_reason: FinishReason | None = None
    error: str | None = None
    drawn: Drawn | None = None


@dataclass(frozen=True)
class LoadProgress:
    """How far loading has come, as data; `bytes_total` 0 means that it is not known yet."""

    stage: str
    bytes_done: int = 0
    bytes_total: int = 0
    seconds: float = 0.0

    @property
    def gb_per_s(self) -> float:
        return self.bytes_done / self.seconds / 1e9 if self.seconds > 0 else 0.0

    @property
    def eta_seconds(self) -> float | None:
        left = self.bytes_total - self.bytes_done
        return left / (self.bytes_done / self.seconds) if self.bytes_done and self.seconds > 0 else None


class Clock:
    """Wall time by part of the step, exclusive: a part's time does not count the parts opened inside it.

    `sync` is called at each boundary so that asynchronous device work is charged where it was asked for.
    """

    def __init__(self, sync: Callable[[], None] = lambda: None) -> None:
        self.seconds: dict[str, float] = {}
        self._sync = sync
        self._open: list[str] = []
        self._since = 0.0

    def _charge(self) -> None:
        self._sync()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._charge()
        self._open.append(part)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()


_NOTHING = nullcontext()


def no_clock(part: str) -> AbstractContextManager[None]:
    """The clock that measures nothing and costs nothing."""
    return _NOTHING
