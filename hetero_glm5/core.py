"""The nouns everyone shares: what a request asks for, what a sequence is, what a step computes, what comes out.

Nothing here knows torch, threads or files.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

MOST_STOPS, MOST_STOP_CHARACTERS, MOST_STOP_IDS = 64, 1000, 1024
MOST_BIASES, MOST_LOGPROBS, MOST_GRAMMAR_CHARACTERS = 1024, 20, 500_000

FinishReason = Literal["stop", "length", "abort", "error"]
GrammarKind = Literal["json_schema", "regex", "lark"]


class UserError(ValueError):
    """Something the user can mend. The message is whole sentences: the value, the limit, the remedy."""


class RequestError(UserError):
    """One request cannot be served (HTTP 400). `param` names the offending field."""

    def __init__(self, message: str, param: str | None = None):
        super().__init__(message)
        self.param = param


class PromptTooLong(RequestError):
    """The prompt leaves no room for an answer. Clients that shorten their conversations then know errors like it."""


class QueueFull(UserError):
    """The waiting line is full (HTTP 429)."""


@dataclass(frozen=True)
class Grammar:
    """What a whole answer must match: a JSON schema, a regular expression, or llguidance's dialect of Lark, in which
    <name> stands for a special token. Only compiling it (Sampler.compile) tells whether it is one. `source` is the
    field of a request that it comes from. RequestError."""

    kind: GrammarKind
    text: str
    source: str | None = None

    def __post_init__(self) -> None:
        kinds = get_args(GrammarKind)
        if self.kind not in kinds:
            raise RequestError(
                f"the grammar is of kind {self.kind!r}; it must be one of {', '.join(kinds)}.", "grammar"
            )
        if not isinstance(self.text, str):
            raise RequestError(f"the grammar is {self.text!r}; it must be a string.", self.param)
        if len(self.text) > MOST_GRAMMAR_CHARACTERS:
            raise RequestError(
                f"the grammar has {len(self.text)} characters; at most {MOST_GRAMMAR_CHARACTERS} can be used.",
                self.param,
            )

    @property
    def param(self) -> str:
        """The field that errors name."""
        if self.source is not None:
            return self.source
        return "response_format" if self.kind == "json_schema" else "grammar"


_NUMBERS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "temperature": (float, lambda v: 0 <= v <= 100, "between 0 and 100"),
    "top_p": (float, lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "top_k": (int, lambda v: v >= 0, "at least 0 (0 means off)"),
    "min_p": (float, lambda v: 0 <= v <= 1, "between 0 and 1"),
    "presence_penalty": (float, lambda v: -2 <= v <= 2, "between -2 and 2"),
    "frequency_penalty": (float, lambda v: -2 <= v <= 2, "between -2 and 2"),
    "repetition_penalty": (float, lambda v: 0.01 <= v <= 2, "between 0.01 and 2 (1 means off)"),
    "max_tokens": (int, lambda v: v >= 1, "at least 1"),
    "min_tokens": (int, lambda v: v >= 0, "at least 0"),
    "seed": (int, lambda v: 0 <= v < 2**64, "between 0 and 2**64 - 1"),
    "n": (int, lambda v: 1 <= v <= 64, "between 1 and 64"),
    "logprobs": (int, lambda v: 0 <= v <= MOST_LOGPROBS, f"between 0 and {MOST_LOGPROBS}"),
    "prompt_logprobs": (int, lambda v: 0 <= v <= MOST_LOGPROBS, f"between 0 and {MOST_LOGPROBS}"),
}
_OPTIONAL = ("max_tokens", "seed", "logprobs", "prompt_logprobs")


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    temperature 0 is greedy. top_p in (0, 1]; top_k 0 means off; min_p keeps what has at least that share of the best
    token's chance. presence_penalty and frequency_penalty count the answer's tokens, repetition_penalty also the
    prompt's. logit_bias adds to the logits of token ids. `seed` makes the draw reproducible whatever else is in the
    batch; without one a sequence draws from a seed of its own. `max_tokens` None means "up to the context length".
    `logprobs` asks for the drawn token's log-probability and those of as many likeliest tokens, before anything above
    changes them; prompt_logprobs for the same of the prompt. `n` answers are drawn for one prompt.
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
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        for name, (kind, fits, limit) in _NUMBERS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            self._check(name, type(value) in (int, kind), "a whole number" if kind is int else "a number")
            self._check(name, fits(value), limit)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name, value, kind in (("stop", stop, str), ("stop_token_ids", self.stop_token_ids, int)):
            if not isinstance(value, list | tuple) or any(type(v) is not kind for v in value):
                raise RequestError(f"{name} is {value!r}; it must be a list of {kind.__name__}.", name)
            object.__setattr__(self, name, tuple(value))
        most = "any number" if self.max_tokens is None else "max_tokens"
        self._check("min_tokens", self.min_tokens <= (self.max_tokens or self.min_tokens), f"between 0 and {most}")
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
        self._check_bias()
        self._check_grammar()

    def _check_bias(self) -> None:
        self._check("logit_bias", isinstance(self.logit_bias, Mapping), "a mapping of token ids to numbers")
        if len(self.logit_bias) > MOST_BIASES:
            raise RequestError(
                f"logit_bias has {len(self.logit_bias)} ids; at most {MOST_BIASES} can be used.", "logit_bias"
            )
        for token, bias in self.logit_bias.items():
            if type(token) is not int or type(bias) not in (int, float) or not -100 <= bias <= 100:
                raise RequestError(
                    f"logit_bias gives {token!r} {bias!r}; it must give token ids numbers between -100 and 100.",
                    "logit_bias",
                )

    def _check_grammar(self) -> None:
        self._check("grammar", isinstance(self.grammar, Grammar | None), "a Grammar or None")
        if self.grammar is None:
            return
        because = "with a grammar, which decides where the answer ends"
        self._check("min_tokens", not self.min_tokens, f"0 {because}")
        self._check("ignore_eos", not self.ignore_eos, f"False {because}")

    def _check(self, name: str, ok: bool, limit: str) -> None:
        if not ok:  # NaN fails every comparison and lands here too
            raise RequestError(f"{name} is {getattr(self, name)!r}; it must be {limit}.", name)


@dataclass(frozen=True)
class Drawn:
    """What the sampler drew for one position. With SamplingParams.logprobs, `logprob` is the token's and `top` holds
    (token, log-probability) of the likeliest ones, best first. `error` says why nothing could be drawn."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    error: str | None = None


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

    @property
    def decodes(self) -> bool:
        """Whether it does nothing but decode."""
        return all(chunk.decodes for chunk in self.chunks)


@dataclass(frozen=True)
class TokenEvent:
    """What a step tells about one sequence. `text` is new text that no stop string can take back any more; `matched` is
    the end token or the stop string that ended it."""

    seq: Sequence
    token: int | None
    text: str
    finish_reason: FinishReason | None = None
    error: str | None = None
    drawn: Drawn | None = None
    matched: int | str | None = None


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
