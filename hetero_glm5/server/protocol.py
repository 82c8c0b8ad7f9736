"""What a request may say, in OpenAI's fields. Whatever cannot be honoured is a 400 that names the field.

Three kinds of fields: those of the models below; those that change nothing (IGNORED); and those that ask for something
this server does not do (UNSUPPORTED), which are accepted only with the value that asks for nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hetero_glm5.core import Grammar, RequestError, SamplingParams
from hetero_glm5.server import fields
from hetero_glm5.server.constraints import FIELDS, Constraint, asked_constraint
from hetero_glm5.server.tokenizer import SamplingDefaults
from hetero_glm5.server.tool_grammar import named, tool_calls

IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # field: the values, besides null, that ask for nothing
    "best_of": (1,),
    "prompt_logprobs": (),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "skip_special_tokens": (False,),
    "include_stop_str_in_output": (False,),
}


class StrictFields(BaseModel):
    """Fields that it does not have are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, data: Any) -> Any:
        """Of the fields that it does not have, pydantic sees one, for which it makes an error: a client may send
        millions."""
        if not isinstance(data, dict):
            return data
        unknown = [name for name in data if name not in cls.model_fields]
        unknown.sort(key=lambda name: data[name] is None)  # null may be dropped yet, see SparseBody
        dropped = frozenset(unknown[1:])
        return {name: value for name, value in data.items() if name not in dropped} if dropped else data


class StreamOptions(StrictFields):
    include_usage: bool = False
    include_obfuscation: bool = False  # accepted; nothing is padded


class Message(BaseModel):
    """One turn. Fields that clients send back from an earlier answer (refusal, annotations, …) are dropped."""

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: fields.Content = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: fields.ToolCalls = None
    tool_call_id: str | None = None


def _untyped(schema: dict[str, Any], kind: Any) -> None:
    """Adds what RequestBody says of `ignored` and `unsupported` fields to a model's JSON schema."""
    for name in sorted(kind.ignored):
        schema["properties"][name] = {"description": "Accepted; changes nothing."}
    for name, neutral in kind.unsupported.items():
        schema["properties"][name] = {"enum": [*neutral, None], "description": "Not supported."}


class RequestBody(StrictFields):
    """Fields that are `ignored` change nothing; those that are `unsupported` are accepted only with the values, besides
    null, that ask for nothing."""

    model_config = ConfigDict(json_schema_extra=_untyped)
    ignored: ClassVar[frozenset[str]] = frozenset()
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}


class SparseBody(RequestBody):
    """A field that is null was not sent."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class Tuning(RequestBody):
    """How a token is drawn, in the names that OpenAI's and SGLang's requests share. None: as the checkpoint has it."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None


TUNED = tuple(Tuning.model_fields)
SAMPLED = (*TUNED, "seed", "n", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "logit_bias")  # SamplingParams'


class SamplingRequest(Tuning):
    """The fields that both kinds of completion share. `rid` and `request_id` are other servers' names for the request,
    by which it can be aborted; requests share cached prefixes with those of the same cache_salt."""

    ignored = IGNORED
    unsupported = UNSUPPORTED
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logit_bias: fields.Biases = {}
    seed: int | None = None
    n: int | None = None
    stop: fields.Strings = []
    stop_token_ids: Annotated[list[int] | None, Field(fail_fast=True)] = None
    ignore_eos: bool = False
    min_tokens: int = 0
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str | None, Field(max_length=1000)] = None
    rid: Annotated[str | None, Field(max_length=200)] = None
    request_id: Annotated[str | None, Field(max_length=200)] = None
    response_format: fields.ResponseFormat = None
    structured_outputs: fields.Structure = None
    guided_json: fields.Schema = None
    guided_regex: fields.Text = None
    guided_grammar: fields.Text = None
    guided_choice: fields.Choices = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def names(self) -> frozenset[str]:
        """What the client calls this request."""
        return frozenset(name for name in (self.rid, self.request_id) if name)

    def grammar(self, *, thinking: bool = False) -> Grammar | None:
        """What the answer must match; `thinking`: after reasoning that the prompt has opened. Raises RequestError."""
        constraint = self._constraint()
        return None if constraint is None else constraint.grammar(thinking=thinking)

    def _constraint(self) -> Constraint | None:
        return asked_constraint({name: getattr(self, name) for name in FIELDS})

    def sampling(self, defaults: SamplingDefaults, grammar: Grammar | None = None) -> SamplingParams:
        """Raises RequestError. top_k -1 is the other servers' spelling of "off"."""
        given = {name: value for name in SAMPLED if (value := getattr(self, name)) is not None}
        values = {**dataclasses.asdict(defaults), **given, **self._scores()}
        values["top_k"] = 0 if values["top_k"] == -1 else values["top_k"]
        return SamplingParams(**values, max_tokens=self._most_tokens(), grammar=grammar)

    def _most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def _scores(self) -> dict[str, int | None]:
        """Which log-probabilities are asked for, in SamplingParams' fields."""
        return {}


class CompletionRequest(SamplingRequest):
    prompt: fields.Prompts
    echo: bool | None = False
    logprobs: int | None = None

    @property
    def silent(self) -> bool:
        """Whether only the prompt is wanted. The engine draws one token all the same; it is not told."""
        return bool(self.echo) and super()._most_tokens() == 0

    def _most_tokens(self) -> int | None:
        return 1 if self.silent else super()._most_tokens()

    def _scores(self) -> dict[str, int | None]:
        return {"logprobs": self.logprobs, "prompt_logprobs": self.logprobs if self.echo else None}


class ChatRequest(SamplingRequest):
    """A tool's `strict` is not looked at: calls that are required, or named, are held to the schemas, and others are
    not. separate_reasoning false leaves the reasoning in the content."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    tools: fields.Tools = None
    tool_choice: fields.ToolChoice = "auto"
    parallel_tool_calls: bool | None = True
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    separate_reasoning: bool | None = True
    logprobs: bool | None = False
    top_logprobs: int | None = None

    @property
    def template_kwargs(self) -> dict[str, Any]:
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model may call; None when it may call none. Raises RequestError."""
        if self.tool_choice == "none":
            return None
        if self.must_call and not self.tools:
            raise RequestError("tool_choice asks for a call, and there are no tools to call.", "tool_choice")
        return self.tools or None

    @property
    def must_call(self) -> bool:
        return self.tool_choice not in ("auto", "none")

    @property
    def parallel(self) -> bool:
        """Whether an answer may hold several calls."""
        return self.parallel_tool_calls is not False

    def grammar(self, *, thinking: bool = False) -> Grammar | None:
        """A call, if there must be one; else what the content must match, beside which tools may be called."""
        tools, constraint = self.offered_tools, self._constraint()
        if self.must_call and tools is not None:
            choices = tools if self.tool_choice == "required" else named(tools, self.tool_choice["name"])
            return tool_calls(choices, thinking=thinking, parallel=self.parallel)
        return None if constraint is None else constraint.grammar(tools, thinking=thinking, parallel=self.parallel)

    @property
    def plain_messages(self) -> list[dict[str, Any]]:
        """For the template: a field that was not sent does not exist there."""
        return [{name: value for name, value in message if value is not None} for message in self.messages]

    def _scores(self) -> dict[str, int | None]:
        if self.top_logprobs and not self.logprobs:
            raise RequestError(f"top_logprobs is {self.top_logprobs}, which needs logprobs to be true.", "top_logprobs")
        return {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}


M = TypeVar("M", bound=BaseModel)


def parse_request(kind: type[M], body: bytes) -> M:
    """The request in a JSON body. Raises RequestError naming the first field that is wrong."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"The body is no valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise RequestError("The body must be a JSON object.")
    if body.count(b"[") + body.count(b"{") > fields.MOST_LEVELS and fields.too_deep(data):
        raise RequestError(
            f"The body nests lists and objects more than {fields.MOST_LEVELS} levels deep, the most that can be used. "
            "Send a flatter one."
        )
    if issubclass(kind, RequestBody):
        data = {name: value for name, value in data.items() if name not in kind.ignored}
        for name, neutral in kind.unsupported.items():
            if name in data:
                refuse_unless_neutral(name, data.pop(name), neutral)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise RequestError(*_sentence(first)) from error


def refuse_unless_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    """Raises RequestError for a field of which only the values that ask for nothing are supported."""
    if value is None or any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in neutral):
        return
    only = " or ".join(orjson.dumps(v).decode() for v in neutral)
    raise RequestError(f"{name} is not supported by this server{f' (only {only} is)' if only else ''}.", name)


def _sentence(error: Any) -> tuple[str, str]:
    """One pydantic error as a sentence, and the name of the top-level field."""
    field = str(error["loc"][0])
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).removeprefix(".")
    if error["type"] == "missing":
        return f"{where} is missing.", field
    if error["type"] == "extra_forbidden":
        return f"{where} is not a field of this request.", field
    if error["type"] == "value_error":
        return f"{where} {error['msg'].removeprefix('Value error, ')}.", field
    return f"{where} is wrong: {error['msg'][0].lower()}{error['msg'][1:]}.", field
