"""Messages to a prompt, through the chat template that a checkpoint brings.

The template runs in jinja2's sandbox. What a user writes becomes part of the prompt as it is: a message that spells a
special token (`<|user|>`, `</think>`) puts that token into the prompt, as in the other servers of this format.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hetero_glm5.core import RequestError, UserError
from hetero_glm5.model_config import read_json

# A line in Claude Code's system prompts. It changes with every call, and nothing after it would be found in the cache.
_BILLING = re.compile(r"^x-anthropic-billing-header:.*\n?", re.MULTILINE)
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class ChatTemplate:
    """One template, or several by name: `tool_use`, if there is one, for requests with tools, else `default`."""

    def __init__(self, sources: dict[str, str], special_tokens: dict[str, str], where: str):
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._special_tokens = special_tokens
        try:
            self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{where}, line {error.lineno}: the chat template is no valid Jinja: {error}.") from error
        except (RecursionError, SyntaxError, ValueError) as error:  # nested too deeply for Jinja or Python; no Unicode
            raise UserError(f"{where}: the chat template cannot be compiled: {error}.") from error

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate | None:
        """The template in chat_template.jinja or tokenizer_config.json; None when there is none. Raises UserError."""
        config_path, path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = read_json(config_path, "the tokenizer's settings cannot be read") if config_path.exists() else {}
        special = {name: _text_of(config[name], name, config_path) for name in _SPECIAL if config.get(name) is not None}
        if path.exists():
            try:
                return cls({"default": path.read_text(encoding="utf-8")}, special, str(path))
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path} cannot be read: {error}.") from error
        source = config.get("chat_template")
        if source is None:
            return None
        return cls(_named_sources(source, config_path), special, str(config_path))

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, kwargs: dict[str, Any]) -> str:
        """The prompt up to where the assistant's turn begins. Raises RequestError."""
        template = self._templates.get("tool_use") if tools else None
        template = template or self._templates["default"]
        try:
            return template.render(
                {**self._special_tokens, "clear_thinking": False, **kwargs},
                messages=_normalised(messages),
                tools=tools or None,
                add_generation_prompt=True,
            )
        except RequestError:
            raise
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            raise RequestError(f"The chat template refuses these messages: {error}.", "messages") from error


def _normalised(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What GLM-5's template expects: text as one string (never None), arguments as an object, no `developer` role."""
    return [_normalised_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _normalised_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    role = "system" if message["role"] == "developer" else message["role"]
    if role == "system":
        content = _BILLING.sub("", content or "")
    message = {**message, "role": role, "content": content or ""}
    if message.get("tool_calls"):
        message["tool_calls"] = [
            _with_object(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(message["tool_calls"])
        ]
    return message


def _with_object(call: dict[str, Any], where: str) -> dict[str, Any]:
    arguments = call["function"].get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{where}.function.arguments is no valid JSON: {error}.", "messages") from error
    if not isinstance(arguments, dict | None):
        raise RequestError(f"{where}.function.arguments must be a JSON object.", "messages")
    return {**call, "function": {**call["function"], "arguments": arguments or {}}}


def _named_sources(source: Any, where: Path) -> dict[str, str]:
    """tokenizer_config.json holds one template, or a list of {"name", "template"}."""
    if isinstance(source, str):
        return {"default": source}
    entries = source if isinstance(source, list) else [None]
    if not all(isinstance(e, dict) and _is_text(e.get("name")) and _is_text(e.get("template")) for e in entries):
        raise UserError(f'{where}: "chat_template" must be a text or a list of {{"name": text, "template": text}}.')
    named = {entry["name"]: entry["template"] for entry in entries}
    if "default" not in named:
        raise UserError(f'{where}: "chat_template" has no template named default; its names are [{", ".join(named)}].')
    return named


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _text_of(token: Any, name: str, where: Path) -> str:
    """A special token is written as a text, or as an object whose "content" is that text."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise UserError(f'{where}: "{name}" is neither a text nor an object with a text as its "content".')
    return text


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """JSON as models were trained on it: unlike jinja2's own filter it escapes nothing for HTML."""
    separators = (", ", ": ") if indent is None else (",", ": ")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
