"""What a request of OpenAI's Responses API may say, and the conversation it stands for, in the form of chat messages.

The answer's reasoning is given as text and, for clients that send nothing else back, as `encrypted_content`: the same
text, encoded but not secret.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from hetero_glm5.core import RequestError, SamplingParams
from hetero_glm5.server.fields import LEFT_OUT, OBJECT, TEXT, form, listed, readable, shown
from hetero_glm5.server.protocol import SparseBody
from hetero_glm5.server.tokenizer import SamplingDefaults
from hetero_glm5.server.tool_grammar import ANY_JSON
from hetero_glm5.server.turn import Asked

_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_ENCODED = "hetero_glm5:"


def encoded(reasoning: str) -> str:
    return _ENCODED + base64.b64encode(reasoning.encode("utf-8", "replace")).decode()


def _decoded(content: Any) -> str:
    """Empty for what another server encrypted."""
    if not isinstance(content, str) or not content.startswith(_ENCODED):
        return ""
    try:
        return base64.b64decode(content.removeprefix(_ENCODED), validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _text(value: Any) -> str:
    """Content as one text. Raises ValueError."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of parts")
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXTS or not isinstance(part.get("text"), str):
            raise ValueError(f"has a part of type {shown(kind)} at [{i}]; only text can be used")
    return "".join(part["text"] for part in value)


def _message(item: dict[str, Any]) -> dict[str, Any]:
    if item.get("role") not in ("user", "assistant", "system", "developer"):
        raise ValueError(f"has the role {shown(item.get('role'))}; it must be user, assistant, system or developer")
    return {"role": item["role"], "content": _text(item.get("content"))}


def _call(item: dict[str, Any]) -> dict[str, Any]:
    name, arguments = _string(item, "name"), _string(item, "arguments")
    call = {"id": _string(item, "call_id"), "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _output(item: dict[str, Any]) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": _string(item, "call_id"), "content": _text(readable(item.get("output")))}


def _reasoning(item: dict[str, Any]) -> dict[str, Any]:
    text = _text(item.get("content") or "") or _decoded(item.get("encrypted_content"))
    return {"role": "assistant", "content": "", "reasoning_content": text or _text(item.get("summary") or "")}


def _string(item: dict[str, Any], name: str) -> str:
    if not isinstance(item.get(name), str):
        raise ValueError(f"has a {item['type']} whose {name} is missing or no string")
    return item[name]


_ITEMS = {
    "message": _message,
    "function_call": _call,
    "function_call_output": _output,
    "reasoning": _reasoning,
}


def _messages(value: Any) -> list[dict[str, Any]]:
    """Input items as messages. The items of one assistant's turn become one message."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of items")
    turns: list[list[dict[str, Any]]] = []
    for i, item in enumerate(value):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if not isinstance(kind, str) or kind not in _ITEMS:
            raise ValueError(f"has an item of type {shown(kind)} at [{i}]; it must be one of {', '.join(_ITEMS)}")
        try:
            message = _ITEMS[kind](item)
        except ValueError as error:
            raise ValueError(f"at [{i}] {error}") from error
        if turns and _continues(turns[-1][-1], message):
            turns[-1].append(message)
        else:
            turns.append([message])
    return list(map(_joined, turns))


def _continues(last: dict[str, Any], message: dict[str, Any]) -> bool:
    """Reasoning begins a new turn of the assistant's; what follows it belongs to the same one."""
    return last["role"] == message["role"] == "assistant" and "reasoning_content" not in message


def _joined(turn: list[dict[str, Any]]) -> dict[str, Any]:
    """One message of a turn's items."""
    message = turn[0] | {"content": "".join(item["content"] for item in turn)}
    calls = [call for item in turn for call in item.get("tool_calls", ())]
    return message | {"tool_calls": calls} if calls else message


def _tools(value: Any) -> list[dict[str, Any]]:
    """Function tools, in the form of chat completions; tools of other types are skipped."""
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError("must be a list of tools")
    functions = [tool for tool in value if tool.get("type") == "function"]
    if not all(isinstance(tool.get("name"), str) for tool in functions):
        raise ValueError('must hold functions of the form {"type": "function", "name": …, "parameters": …}')
    kept = ("name", "description", "parameters")
    return [
        {"type": "function", "function": {name: tool[name] for name in kept if tool.get(name) is not None}}
        for tool in functions
    ]


def _tool_choice(value: Any) -> dict[str, Any]:
    """As {"mode": auto, none, required or only} and perhaps the `names` of the functions that may be called."""
    if value in ("auto", "none", "required"):
        return {"mode": value}
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "function" and isinstance(value.get("name"), str):
        return {"mode": "only", "names": [value["name"]]}
    if kind == "allowed_tools" and value.get("mode") in ("auto", "required") and isinstance(value.get("tools"), list):
        names = [tool.get("name") for tool in value["tools"] if isinstance(tool, dict)]
        return {"mode": value["mode"], "names": [name for name in names if isinstance(name, str)]}
    raise ValueError(f"is {shown(value)}; it must be auto, none, required, a function or allowed_tools")


_PART = form({"type": {"enum": list(_TEXTS)}, "text": TEXT})
_TEXT = {"anyOf": [TEXT, listed(_PART)]}
_OUTPUT = {"anyOf": [TEXT, listed({"anyOf": [_PART, LEFT_OUT]})]}
_ANY_ITEM = {
    "anyOf": [
        form(
            {"role": {"enum": ["user", "assistant", "system", "developer"]}, "content": _TEXT},
            {"type": {"const": "message"}},
        ),
        form({"type": {"const": "function_call"}, "call_id": TEXT, "name": TEXT, "arguments": TEXT}),
        form({"type": {"const": "function_call_output"}, "call_id": TEXT, "output": _OUTPUT}),
        form({"type": {"const": "reasoning"}}, {"content": _TEXT, "summary": _TEXT, "encrypted_content": TEXT}),
    ]
}
_TOOL = form({"type": {"const": "function"}, "name": TEXT}, {"description": TEXT, "parameters": OBJECT})
_NAMED_TOOL = form({"type": {"const": "function"}, "name": TEXT})
_ANY_CHOICE = {
    "anyOf": [
        {"enum": ["auto", "none", "required"]},
        _NAMED_TOOL,
        form(
            {
                "type": {"const": "allowed_tools"},
                "mode": {"enum": ["auto", "required"]},
                "tools": listed(_NAMED_TOOL),
            }
        ),
    ]
}


class Reasoning(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    effort: str | None = None

    @property
    def template(self) -> dict[str, Any]:
        if self.effort is None:
            return {}
        return {"enable_thinking": False} if self.effort == "none" else {"reasoning_effort": self.effort}


class Format(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = "answer"
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None

    @property
    def wanted(self) -> dict[str, Any] | None:
        """The schema of the answer, if it must be JSON."""
        return None if self.type == "text" else self.json_schema or ANY_JSON

    @property
    def told(self) -> dict[str, Any]:
        named = {"name": self.name, "schema": self.wanted} if self.type == "json_schema" else {}
        return {"type": self.type, **named}


class Text(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    format: Format = Format()


class ResponsesRequest(SparseBody):
    """`input` becomes chat messages, `tools` those of chat completions, and `tool_choice` what _tool_choice says."""

    ignored = frozenset(
        ("user", "safety_identifier", "service_tier", "stream_options", "max_tool_calls", "client_metadata")
        + ("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "access_programs")
    )
    unsupported = {
        "background": (False,),
        "conversation": (),
        "prompt": (),
        "context_management": ([],),
        "moderation": (),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }
    model: str | None = None
    input: Annotated[Any, BeforeValidator(_messages), WithJsonSchema({"anyOf": [TEXT, listed(_ANY_ITEM)]})]
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: Annotated[Any, BeforeValidator(_tools), WithJsonSchema(listed(_TOOL))] = []
    tool_choice: Annotated[Any, BeforeValidator(_tool_choice), WithJsonSchema(_ANY_CHOICE)] = {"mode": "auto"}
    parallel_tool_calls: bool = True
    text: Text = Text()
    reasoning: Reasoning = Reasoning()
    include: Annotated[list[str], Field(fail_fast=True)] = []
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: float | None = None
    top_p: float | None = None
    metadata: dict[str, Any] = {}
    store: bool = True
    stream: bool = False

    def sampling(self, defaults: SamplingDefaults) -> SamplingParams:
        """Raises RequestError."""
        given = {name: value for name in ("temperature", "top_p") if (value := getattr(self, name)) is not None}
        return SamplingParams(**{**asdict(defaults), **given}, max_tokens=self.max_output_tokens)

    def asked(self, before: list[dict[str, Any]], params: SamplingParams) -> Asked:
        """What is asked of a turn that follows `before` and the input. Raises RequestError."""
        if "message.output_text.logprobs" in self.include:
            raise RequestError("include asks for message.output_text.logprobs, which is not supported.", "include")
        instructions = [{"role": "system", "content": self.instructions}] if self.instructions else []
        names, mode = self.tool_choice.get("names"), self.tool_choice["mode"]
        allowed = self.tools
        if mode != "only" and names is not None:
            among = frozenset(names)
            allowed = [tool for tool in self.tools if tool["function"]["name"] in among]
        return Asked(
            [*instructions, *before, *self.input],
            allowed,
            params,
            choice=mode,
            function=names[0] if mode == "only" else "",
            parallel=self.parallel_tool_calls,
            schema=self.text.format.wanted,
            schema_field="text",
            template=self.reasoning.template,
        )
