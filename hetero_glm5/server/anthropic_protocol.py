"""What a request of Anthropic's Messages API may say, and the conversation it stands for, in OpenAI's form.

As there, a turn thinks only if `thinking` asks for it; its budget changes nothing. What only places a cache's marks or
edits a conversation to save room is ignored: every prefix is cached here.
"""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator

from hetero_glm5.core import MOST_STOP_CHARACTERS, MOST_STOPS, RequestError, SamplingParams
from hetero_glm5.server.fields import LEFT_OUT, OBJECT, TEXT, TEXT_PART, form, listed, readable, shown
from hetero_glm5.server.protocol import SparseBody, StrictFields
from hetero_glm5.server.tokenizer import SamplingDefaults
from hetero_glm5.server.turn import Asked

_FIELDS: dict[str, dict[str, type]] = {  # what each type of block must have
    "text": {"text": str},
    "thinking": {"thinking": str},
    "redacted_thinking": {},
    "tool_use": {"id": str, "name": str, "input": dict},
    "tool_result": {"tool_use_id": str},
}
_BLOCKS = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}
_TEXT_BLOCKS = {"anyOf": [TEXT, listed(TEXT_PART)]}
_RESULT = {"anyOf": [TEXT, listed({"anyOf": [TEXT_PART, LEFT_OUT]})]}
_KINDS = {str: TEXT, dict: OBJECT}
_ANY_BLOCK = {
    "anyOf": [
        form(
            {"type": {"const": kind}} | {name: _KINDS[wanted] for name, wanted in needed.items()},
            {"content": _RESULT, "is_error": {"type": "boolean"}} if kind == "tool_result" else {},
        )
        for kind, needed in _FIELDS.items()
    ]
}
_CHOICES: dict[str, Any] = {"auto": "auto", "any": "required", "tool": "only", "none": "none"}


def _blocks(value: Any, usable: tuple[str, ...] = ("text",)) -> list[dict[str, Any]]:
    """Content as blocks of the usable types. Raises ValueError."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of blocks")
    for i, block in enumerate(value):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind not in usable:
            raise ValueError(f"has a block of type {shown(kind)} at [{i}]; only {', '.join(usable)} can be used here")
        for name, wanted in _FIELDS[kind].items():
            if not isinstance(block.get(name), wanted):
                raise ValueError(f"has a {kind} block at [{i}] whose {name} is missing or no {wanted.__name__}")
        if kind == "tool_result":
            try:
                _blocks(readable(block.get("content") or ""))
            except ValueError as error:
                raise ValueError(f"has a tool_result at [{i}] whose content {error}") from error
    return value


def _tools(value: Any) -> list[dict[str, Any]]:
    """Tools of the client's own, in OpenAI's form; those that a server would run are skipped."""
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError("must be a list of tools")
    return [_function(tool) for tool in value if tool.get("type") in (None, "custom")]


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(tool.get("name"), str) or not isinstance(tool.get("input_schema"), dict):
        raise ValueError('must hold tools of the form {"name": …, "input_schema": {…}}')
    about = {"description": tool["description"]} if isinstance(tool.get("description"), str) else {}
    return {"type": "function", "function": {"name": tool["name"], **about, "parameters": tool["input_schema"]}}


_TOOL = form({"name": TEXT, "input_schema": OBJECT}, {"type": {"const": "custom"}, "description": TEXT})


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    role: Literal["user", "assistant", "system"]
    content: Annotated[Any, WithJsonSchema({"anyOf": [TEXT, listed(_ANY_BLOCK)]})]

    @field_validator("content", mode="before")
    @classmethod
    def _check(cls, value: Any, info: ValidationInfo) -> list[dict[str, Any]]:
        return _blocks(value, _BLOCKS[info.data["role"]]) if "role" in info.data else []


StopSequence = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARACTERS)]


class ToolChoice(StrictFields):
    type: Literal["auto", "any", "tool", "none"] = "auto"
    name: str = ""
    disable_parallel_tool_use: bool = False


class Thinking(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["enabled", "disabled", "adaptive", "between_tools"] = "disabled"


class Format(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    type: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)
    effort: str | None = None
    format: Format | None = None


class Conversation(SparseBody):
    """What makes a prompt: all that counting its tokens takes."""

    ignored = frozenset(
        ("metadata", "cache_control", "service_tier", "betas", "anthropic_beta", "anthropic_version")
        + ("context_management", "diagnostics", "inference_geo", "speed", "user_profile_id", "workspace_id")
    )
    unsupported = {"container": (), "mcp_servers": ([],)}
    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    system: Annotated[Any, BeforeValidator(_blocks), WithJsonSchema(_TEXT_BLOCKS)] = []
    tools: Annotated[Any, BeforeValidator(_tools), WithJsonSchema(listed(_TOOL))] = []
    tool_choice: ToolChoice = ToolChoice()
    thinking: Thinking = Thinking()
    output_config: OutputConfig = OutputConfig()

    def asked(self, params: SamplingParams) -> Asked:
        """Raises RequestError."""
        if self.messages[-1].role == "assistant":
            raise RequestError(
                "The last message is the assistant's: answers are not continued. End the conversation with a message "
                "of the user.",
                "messages",
            )
        system = "\n".join(block["text"] for block in self.system)
        messages = [{"role": "system", "content": system}] if system else []
        for message in self.messages:
            messages += _plain(message.role, message.content)
        effort = {} if self.output_config.effort is None else {"reasoning_effort": self.output_config.effort}
        return Asked(
            messages,
            self.tools,
            params,
            choice=_CHOICES[self.tool_choice.type],
            function=self.tool_choice.name,
            parallel=not self.tool_choice.disable_parallel_tool_use,
            schema=self.output_config.format and self.output_config.format.json_schema,
            schema_field="output_config",
            template={"enable_thinking": self.thinking.type != "disabled", **effort},
        )


class CountRequest(Conversation):
    """What else a request for a message says does not matter."""

    model_config = ConfigDict(extra="ignore")


class MessagesRequest(Conversation):
    max_tokens: int
    stop_sequences: Annotated[list[StopSequence], Field(fail_fast=True, max_length=MOST_STOPS)] = []
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool = False

    def sampling(self, defaults: SamplingDefaults) -> SamplingParams:
        """Raises RequestError."""
        names = ("temperature", "top_p", "top_k")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        stop = tuple(self.stop_sequences)
        return SamplingParams(**{**asdict(defaults), **given}, max_tokens=self.max_tokens, stop=stop)


def _plain(role: str, blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One message in OpenAI's form, or several: there a tool's result is a message of its own."""
    if role == "assistant":
        return [_assistant(blocks)]
    messages: list[dict[str, Any]] = []
    for kind, run in groupby(blocks, lambda block: block["type"]):
        if kind == "text":
            messages.append({"role": role, "content": "".join(block["text"] for block in run)})
        else:
            messages += [
                {"role": "tool", "tool_call_id": block["tool_use_id"], "content": _result(block)} for block in run
            ]
    return messages


def _assistant(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """Signatures mean nothing here, and thinking that another server redacted is lost."""
    message: dict[str, Any] = {"role": "assistant"}
    message["content"] = "".join(block["text"] for block in blocks if block["type"] == "text")
    if reasoning := "".join(block["thinking"] for block in blocks if block["type"] == "thinking"):
        message["reasoning_content"] = reasoning
    if calls := [_call(block) for block in blocks if block["type"] == "tool_use"]:
        message["tool_calls"] = calls
    return message


def _call(block: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": block["id"],
        "type": "function",
        "function": {"name": block["name"], "arguments": block["input"]},
    }


def _result(block: dict[str, Any]) -> str:
    text = "".join(part["text"] for part in _blocks(readable(block.get("content") or "")))
    return f"Error: {text}" if block.get("is_error") is True else text
