"""What a request may say, in OpenAI's fields. Whatever cannot be honoured is a 400 that names the field.

Three kinds of fields: those of the models below; those that change nothing (IGNORED); and those that ask for something
this server does not do (UNSUPPORTED), which are accepted only with the value that asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hetero_glm5.core import RequestError, SamplingParams
from hetero_glm5.server.tokenizer import SamplingDefaults

IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
)
UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # field: the values, besides null, that ask for nothing
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_grammar": (),
    "guided_choice": ([],),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "cache_salt": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "skip_special_tokens": (False,),
    "include_stop_str_in_output": (False,),
}


def _strings(value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise ValueError("must be a string or a list of strings")
    return values


def _prompts(value: Any) -> list[str | list[int]]:
    """A prompt is a text or token ids; there may be one or several."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(v, str) for v in value) or all(_is_token_ids(v) for v in value):
            return value
        if _is_token_ids(value):
            return [value]
    raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists, not empty")


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _content(value: Any) -> str | list[dict[str, str]] | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string, null or a list of parts")
    for i, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            usable = '{"type": "text", "text": …}'
            raise ValueError(f"has a part of type {_shown(kind)} at [{i}]; only {usable} can be used")
    return value


def _tool_calls(value: Any) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    for call in value if isinstance(value, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError('must be a list of {"function": {"name": …, "arguments": …}}')
    return value


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """Function tools as they came, since templates print them; tools of other types are skipped."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError("must be a list of tools")
    tools = [tool for tool in value if tool.get("type", "function") == "function"]
    for tool in tools:
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError('must hold functions of the form {"type": "function", "function": {"name": …}}')
    return tools


def _tool_choice(value: Any) -> str:
    if value not in (None, "auto", "none"):
        raise ValueError(f"is {_shown(value)}; only auto and none are supported")
    return value or "auto"


def _shown(value: Any) -> str:
    """A client's value in a sentence: a text, or else its kind, since it may be large and deep."""
    return repr(value[:100]) if isinstance(value, str) else type(value).__name__


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class Message(BaseModel):
    """One turn. Fields that clients send back from an earlier answer (refusal, annotations, …) are dropped."""

    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Any, BeforeValidator(_content)] = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[Any, BeforeValidator(_tool_calls)] = None
    tool_call_id: str | None = None


class SamplingRequest(BaseModel):
    """The fields that both kinds of completion share."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Annotated[Any, BeforeValidator(lambda value: [] if value is None else _strings(value))] = []
    stop_token_ids: Annotated[list[int] | None, Field(fail_fast=True)] = None
    ignore_eos: bool = False
    min_tokens: int = 0
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, defaults: SamplingDefaults) -> SamplingParams:
        """Raises RequestError. top_k -1 is the other servers' spelling of "off"."""
        top_k = defaults.top_k if self.top_k is None else self.top_k
        return SamplingParams(
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=0 if top_k == -1 else top_k,
            seed=self.seed,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
        )


class CompletionRequest(SamplingRequest):
    prompt: Annotated[Any, BeforeValidator(_prompts)]


class ChatRequest(SamplingRequest):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    tools: Annotated[Any, BeforeValidator(_tools)] = None
    tool_choice: Annotated[Any, BeforeValidator(_tool_choice)] = "auto"
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None

    @property
    def template_kwargs(self) -> dict[str, Any]:
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}

    @property
    def offered_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model may call; None when it may call none."""
        return (self.tools or None) if self.tool_choice == "auto" else None

    @property
    def plain_messages(self) -> list[dict[str, Any]]:
        """For the template: a field that was not sent does not exist there."""
        return [{name: value for name, value in message if value is not None} for message in self.messages]


R = TypeVar("R", bound=SamplingRequest)


def parse_request(kind: type[R], body: bytes) -> R:
    """The request in a JSON body. Raises RequestError naming the first field that is wrong."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"The body is no valid JSON: {error}.") from error
    if not isinstance(data, dict):
        raise RequestError("The body must be a JSON object.")
    fields = {name: value for name, value in data.items() if name not in IGNORED}
    for name, neutral in UNSUPPORTED.items():
        if name in fields:
            _refuse_unless_neutral(name, fields.pop(name), neutral)
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise RequestError(*_sentence(first)) from error


def _refuse_unless_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
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
