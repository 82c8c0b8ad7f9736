"""Checks of a request's fields that pydantic's types cannot make. Each returns the value to use, or raises ValueError
with the end of a sentence that begins with the field's name. The types at the end pair them with their JSON schemas."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

MOST_TOKEN_ID = 2**31 - 1
MOST_LEVELS = 200  # of lists and objects in each other; what answers quote of them must stay below orjson's 254


def too_deep(value: Any) -> bool:
    """Whether a value of JSON has more than MOST_LEVELS."""
    level = [value]
    for _ in range(MOST_LEVELS):
        held = (v.values() if type(v) is dict else v for v in level)
        level = [inner for values in held for inner in values if type(inner) in (dict, list)]
    return bool(level)


def strings(value: Any) -> list[str]:
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise ValueError("must be a string or a list of strings")
    return values


def prompts(value: Any) -> list[str | list[int]]:
    """A prompt is a text or token ids; there may be one or several."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(v, str) for v in value) or all(_is_token_ids(v) for v in value):
            return value
        if _is_token_ids(value):
            return [value]
    raise ValueError(
        "must be a string, a list of strings, a list of token ids or a list of such lists, not empty; ids are from 0 "
        f"to {MOST_TOKEN_ID}"
    )


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v <= MOST_TOKEN_ID for v in value)


def content(value: Any) -> str | list[dict[str, str]] | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string, null or a list of parts")
    for i, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            usable = '{"type": "text", "text": …}'
            raise ValueError(f"has a part of type {shown(kind)} at [{i}]; only {usable} can be used")
    return value


def readable(output: Any) -> Any:
    """A tool's output with a text in the place of what the model cannot read. Agents send such outputs again with each
    turn, so that refusing one would end the conversation."""
    if not isinstance(output, list):
        return output
    kinds = [part.get("type") if isinstance(part, dict) else None for part in output]
    left_out = [{"type": "text", "text": f"[{kind} left out: this model reads text only]"} for kind in kinds]
    return [a if kind in UNREADABLE else b for a, b, kind in zip(left_out, output, kinds, strict=True)]


def tool_calls(value: Any) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    for call in value if isinstance(value, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError('must be a list of {"function": {"name": …, "arguments": …}}')
        if not isinstance(call.get("id"), str | None):
            raise ValueError(f"has a call whose id is {shown(call['id'])}; it must be a string")
    return value


def tools(value: Any) -> list[dict[str, Any]] | None:
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


def tool_choice(value: Any) -> Any:
    """auto, none, required, or the name of the one function to call as {"name": …}."""
    if value in (None, "auto", "none", "required"):
        return value or "auto"
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        named = '{"type": "function", "function": {"name": …}}'
        raise ValueError(f"is {shown(value)}; it must be auto, none, required or {named}")
    return {"name": function["name"]}


def biases(value: Any) -> dict[int, Any]:
    """JSON's keys are strings."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must be an object that gives token ids numbers")
    wrong = next((key for key in value if not (key.isascii() and key.isdigit() and len(key) < 10)), None)
    if wrong is not None:
        raise ValueError(f"gives {shown(wrong)} a number; its keys must be token ids")
    return {int(key): bias for key, bias in value.items()}


def shown(value: Any) -> str:
    """A client's value in a sentence: a text, or else its kind, since it may be large and deep."""
    return repr(value[:100]) if isinstance(value, str) else type(value).__name__


def listed(items: dict[str, Any], least: int = 0) -> dict[str, Any]:
    """The JSON schema of a list of `least` items or more."""
    return {"type": "array", "items": items, "minItems": least}


def form(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON schema of an object with these fields, and perhaps others."""
    return {"type": "object", "properties": required | (optional or {}), "required": list(required)}


UNREADABLE = ("image", "document", "input_image", "input_file")
TEXT = {"type": "string"}
NULL = {"type": "null"}
OBJECT = {"type": "object"}
TOKEN_IDS = listed({"type": "integer", "minimum": 0, "maximum": MOST_TOKEN_ID})
LEFT_OUT = form({"type": {"enum": list(UNREADABLE)}})
TEXT_PART = form({"type": {"const": "text"}, "text": TEXT})
_NAMED = form({"name": TEXT}, {"description": TEXT, "parameters": OBJECT})
_CALLED = form({"name": TEXT, "arguments": {"anyOf": [TEXT, OBJECT]}})
TEXTS = {"anyOf": [TEXT, listed(TEXT, 1)]}
IDS = {"anyOf": [listed(TOKEN_IDS["items"], 1), listed(TOKEN_IDS, 1)]}

# What constrains an answer is checked in constraints.py.
ResponseFormat = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                form({"type": {"enum": ["text", "json_object"]}}),
                form({"type": {"const": "json_schema"}, "json_schema": form({"schema": OBJECT}, {"name": TEXT})}),
                NULL,
            ]
        }
    ),
]
Schema = Annotated[Any, WithJsonSchema({"type": ["object", "string", "null"]})]
Text = Annotated[Any, WithJsonSchema({"type": ["string", "null"]})]
Choices = Annotated[Any, WithJsonSchema({"anyOf": [listed({**TEXT, "minLength": 1}, 1), NULL]})]
Structure = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                form({"json": {"type": ["object", "string"]}}),
                form({"json_object": {"const": True}}),
                form({"regex": TEXT}),
                form({"grammar": TEXT}),
                form({"choice": listed(TEXT)}),
                NULL,
            ]
        }
    ),
]

Prompts = Annotated[Any, BeforeValidator(prompts), WithJsonSchema({"anyOf": [TEXTS, IDS]})]
Content = Annotated[Any, BeforeValidator(content), WithJsonSchema({"anyOf": [TEXT, listed(TEXT_PART), NULL]})]
ToolCalls = Annotated[
    Any,
    BeforeValidator(tool_calls),
    WithJsonSchema({"anyOf": [listed(form({"function": _CALLED}, {"id": TEXT, "type": TEXT})), NULL]}),
]
Tools = Annotated[
    Any,
    BeforeValidator(tools),
    WithJsonSchema({"anyOf": [listed(form({"type": {"const": "function"}, "function": _NAMED})), NULL]}),
]
ToolChoice = Annotated[
    Any,
    BeforeValidator(tool_choice),
    WithJsonSchema({"anyOf": [{"enum": ["auto", "none", "required", None]}, form({"function": form({"name": TEXT})})]}),
]
Biases = Annotated[
    Any,
    BeforeValidator(biases),
    WithJsonSchema({"type": ["object", "null"], "additionalProperties": {"type": "number"}}),
]
Strings = Annotated[Any, BeforeValidator(strings), WithJsonSchema({"anyOf": [TEXT, listed(TEXT), NULL]})]
