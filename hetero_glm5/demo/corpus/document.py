"""Documents and tasks: what training and measuring take from the corpus, rendered through GLM-5's chat template."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import jinja2

from hetero_glm5.demo.chat_template import CHAT_TEMPLATE
from hetero_glm5.demo.corpus.words import Draw

END = "<|endoftext|>"
# What a model writes: everything after its turn has begun, with the token that ends the turn.
_WRITTEN = re.compile(
    r"(<\|assistant\|>(?:<think>|</think>))(.*?(?:<\|user\|>|<\|observation\|>|<\|endoftext\|>))", re.S
)

SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful AI assistant.",
    "You are a friendly assistant.",
    "Help the user.",
    "Be brief.",
)

Message = dict[str, Any]


@dataclass(frozen=True)
class Document:
    """A training text. `pieces`: its parts in order, and for each whether the model is to write it."""

    kind: str
    pieces: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


@dataclass(frozen=True)
class Task:
    """A held-out question. `expected`: what must appear in the answer's content, or the calls in order, each
    {"name": ..., "arguments": {...}}. `tokens`: the document's length that was asked for, 0 if none was."""

    kind: str
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    thinking: bool
    expected: str | list[dict[str, Any]]
    tokens: int = 0


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, ensure_ascii=False: json.dumps(value, ensure_ascii=ensure_ascii)
    return environment


_TEMPLATE = _environment().from_string(CHAT_TEMPLATE)


def render(
    messages: list[Message],
    tools: list[dict[str, Any]] | None = None,
    *,
    thinking: bool = True,
    generation_prompt: bool = True,
) -> str:
    """The prompt as the server renders it: reasoning that a message brings is kept; a call's arguments are an object or
    its JSON text."""
    return _TEMPLATE.render(
        messages=[_with_objects(message) for message in messages],
        tools=tools,
        clear_thinking=False,
        enable_thinking=thinking,
        add_generation_prompt=generation_prompt,
    )


def _with_objects(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls or not any(isinstance(call["function"]["arguments"], str) for call in calls):
        return message
    functions = [call["function"] for call in calls]
    parsed = [f | {"arguments": json.loads(f["arguments"] or "{}")} for f in functions]
    return message | {"tool_calls": [call | {"function": f} for call, f in zip(calls, parsed, strict=True)]}


def chat(kind: str, messages: list[Message], tools: list[dict[str, Any]] | None = None) -> Document:
    text = render(messages, tools, generation_prompt=False) + END
    parts = _WRITTEN.split(text)  # between, head of the turn, written, between, ...
    pieces = []
    for i in range(0, len(parts) - 1, 3):
        pieces += [(parts[i] + parts[i + 1], False), (parts[i + 2], True)]
    return Document(kind, tuple(pieces))


def prose(kind: str, text: str) -> Document:
    return Document(kind, (("[gMASK]<sop>", False), (text + END, True)))


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def opening(draw: Draw) -> list[Message]:
    """Now and then a system prompt that asks for nothing special."""
    return [system(draw.choice(SYSTEMS))] if draw.chance(0.12) else []


def assistant(content: str, reasoning: str = "") -> Message:
    """`reasoning` empty: a turn with thinking off."""
    return {"role": "assistant", "content": content} | ({"reasoning_content": reasoning} if reasoning else {})
