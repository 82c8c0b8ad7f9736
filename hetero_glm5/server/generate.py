"""POST /generate, SGLang's own route: token ids or text in; text, token ids and what is known of them out.

Streams tell the whole answer so far with each event, as SGLang's do. Log-probabilities are [value, token id, text or
null]; those of a prompt start at its token logprob_start_len (-1: at its last), whose own value is null.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson
from pydantic import BeforeValidator, Field, WithJsonSchema

from hetero_glm5.core import Drawn, Grammar, RequestError, SamplingParams, TokenEvent
from hetero_glm5.server import fields
from hetero_glm5.server.collectors import count
from hetero_glm5.server.constraints import FIELDS, asked_constraint
from hetero_glm5.server.logprobs import finite
from hetero_glm5.server.protocol import TUNED, SparseBody, Tuning
from hetero_glm5.server.responses import Usage, event
from hetero_glm5.server.tokenizer import SamplingDefaults, Tokenizer

DEFAULT_TOKENS = 128  # SGLang's
SAMPLED = (*TUNED, "n", "stop", "stop_token_ids", "ignore_eos", "logit_bias")


def _checked_prompts(value: Any) -> Any:
    fields.prompts(value)
    return value  # whether it is a list matters


class NativeSampling(Tuning, SparseBody):
    """sampling_params. Special tokens stay in the text as they are: the fields about them are accepted and change
    nothing."""

    max_new_tokens: int = DEFAULT_TOKENS
    min_new_tokens: int = 0
    n: int = 1
    stop: fields.Strings = []
    stop_token_ids: Annotated[list[int], Field(fail_fast=True)] = []
    ignore_eos: bool = False
    sampling_seed: int | None = None
    logit_bias: fields.Biases = {}
    json_schema: fields.Schema = None
    regex: fields.Text = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: Literal[False] = False

    def grammar(self) -> Grammar | None:
        """Raises RequestError."""
        asked = dict.fromkeys(FIELDS) | {"guided_json": self.json_schema, "guided_regex": self.regex}
        constraint = asked_constraint(asked)
        return None if constraint is None else constraint.grammar()


class GenerateRequest(SparseBody):
    text: Annotated[Any, BeforeValidator(_checked_prompts), WithJsonSchema(fields.TEXTS)] = None
    input_ids: Annotated[Any, BeforeValidator(_checked_prompts), WithJsonSchema(fields.IDS)] = None
    sampling_params: NativeSampling = NativeSampling()
    rid: Annotated[str | None, Field(max_length=200)] = None
    return_logprob: bool = False
    logprob_start_len: Annotated[int, Field(ge=-1)] = -1
    top_logprobs_num: int = 0
    return_text_in_logprobs: bool = False
    stream: bool = False

    @property
    def prompts(self) -> list[str | list[int]]:
        """Raises RequestError."""
        if (self.text is None) == (self.input_ids is None):
            raise RequestError("A request has either text or input_ids.", "text")
        given = fields.prompts(self.text if self.input_ids is None else self.input_ids)
        if any(isinstance(prompt, str) == (self.text is None) for prompt in given):
            raise RequestError("text holds text, and input_ids token ids.", "text" if self.text else "input_ids")
        return given

    @property
    def many(self) -> bool:
        """Whether a list is answered."""
        several = isinstance(self.text, list) if self.input_ids is None else isinstance(self.input_ids[0], list)
        return several or self.sampling_params.n > 1

    @property
    def silent(self) -> bool:
        """Whether only the prompt is wanted. The engine draws one token all the same; it is not told."""
        return self.sampling_params.max_new_tokens == 0

    def sampling(self, defaults: SamplingDefaults) -> SamplingParams:
        """Raises RequestError. What is not said is as the checkpoint has it."""
        asked = self.sampling_params
        given = {name: value for name in SAMPLED if (value := getattr(asked, name)) is not None}
        values = dataclasses.asdict(defaults) | given
        values["top_k"] = 0 if values["top_k"] == -1 else values["top_k"]
        top = self.top_logprobs_num if self.return_logprob else None
        return SamplingParams(
            **values,
            max_tokens=1 if self.silent else asked.max_new_tokens,
            min_tokens=asked.min_new_tokens,
            seed=asked.sampling_seed,
            grammar=asked.grammar(),
            logprobs=top,
            prompt_logprobs=top if self.logprob_start_len >= 0 else None,
        )


class _Prompt:
    """A prompt, whose log-probabilities are spelt once for all its answers and their events."""

    def __init__(self, asked: GenerateRequest, tokens: list[int], tokenizer: Tokenizer):
        self._asked, self.tokens, self._tokenizer = asked, tokens, tokenizer
        self._told: dict[str, Any] | None = None

    def input(self, last: TokenEvent) -> dict[str, Any]:
        """From logprob_start_len on, the first without its value."""
        if self._told is not None:
            return self._told
        start, known = self._asked.logprob_start_len, last.seq.prompt_logprobs
        if start < 0:
            drawn = [Drawn(self.tokens[-1])]
        else:
            drawn = [Drawn(token) for token in self.tokens[start : start + 1]] + (known or [])[start:]
        spelt = self.scores("input", drawn)
        if start >= 0 and len(known or ()) < len(self.tokens) - 1:  # an answer that ended before the prompt was read
            return spelt
        self._told = {name: orjson.Fragment(orjson.dumps(scores)) for name, scores in spelt.items()}
        return self._told

    def scores(self, side: str, drawn: list[Drawn]) -> dict[str, Any]:
        told: dict[str, Any] = {f"{side}_token_logprobs": [self._score(one.token, one.logprob) for one in drawn]}
        if self._asked.top_logprobs_num:
            tops = [[self._score(*pair) for pair in one.top] or None for one in drawn]
            told[f"{side}_top_logprobs"] = tops
        return told

    def _score(self, token: int, logprob: float | None) -> tuple[float | None, int, str | None]:
        text = self._tokenizer.decode([token]) if self._asked.return_text_in_logprobs else None
        return finite(logprob), token, text


class _Answered:
    """One answer so far."""

    def __init__(self, asked: GenerateRequest, prompt: _Prompt, name: str):
        self._asked, self._prompt, self._name = asked, prompt, name
        self._started = time.monotonic()
        self._text, self._drawn = "", list[Drawn]()
        self._last: TokenEvent | None = None

    def tell(self, told: TokenEvent) -> None:
        self._last = told
        self._text += told.text
        if told.token is not None:
            self._drawn.append(told.drawn or Drawn(told.token))

    def whole(self) -> dict[str, Any]:
        assert self._last is not None
        meta = {
            "id": self._name,
            "finish_reason": self._reason(self._last),
            "prompt_tokens": len(self._prompt.tokens),
            "completion_tokens": len(self._drawn),
            "cached_tokens": self._last.seq.num_cached or 0,
            "e2e_latency": time.monotonic() - self._started,
        }
        if self._asked.return_logprob:
            meta |= self._prompt.input(self._last) | self._prompt.scores("output", self._drawn)
        return {"text": self._text, "output_ids": [one.token for one in self._drawn], "meta_info": meta}

    def _reason(self, last: TokenEvent) -> dict[str, Any] | None:
        if last.finish_reason is None:
            return None
        detail: dict[str, dict[str, Any]] = {"stop": {"matched": last.matched}, "length": {"length": len(self._drawn)}}
        return {"type": last.finish_reason} | detail.get(last.finish_reason, {})


class GenerateCollector:
    """A choice is the whole answer so far."""

    def __init__(self, asked: GenerateRequest, prompts: list[list[int]], tokenizer: Tokenizer, name: str):
        self.usage = Usage(sum(map(len, prompts)))
        self._asked, self._each = asked, asked.sampling_params.n
        given = [_Prompt(asked, prompt, tokenizer) for prompt in prompts]
        self._answers = [_Answered(asked, prompt, name) for prompt in given for _ in range(self._each)]

    def opening(self) -> list[dict[str, Any]]:
        return []

    def tell(self, index: int, told: TokenEvent) -> Iterator[dict[str, Any]]:
        if self._asked.silent:
            told = TokenEvent(told.seq, None, "", told.finish_reason)
        count(self.usage, index, told, self._each)
        self._answers[index].tell(told)
        return self._chunks(index)

    def _chunks(self, index: int) -> Iterator[dict[str, Any]]:
        yield self._answers[index].whole() | ({"index": index} if self._asked.many else {})

    def choices(self) -> list[dict[str, Any]]:
        return [answer.whole() for answer in self._answers]


@dataclass(frozen=True)
class NativeAnswer:
    """SGLang's shapes, in the place of responses.Answer. `many`: a list is answered, even of one."""

    many: bool

    def whole(self, choices: list[dict[str, Any]], usage: Usage, timings: dict[str, float]) -> Any:
        return choices if self.many else choices[0]

    def chunk(self, choices: list[dict[str, Any]]) -> bytes:
        return event(choices[0])

    def usage_chunk(self, usage: Usage, timings: dict[str, float]) -> bytes:
        raise AssertionError("SGLang's streams have none")
