"""GLM-5's output, as it streams, into reasoning, content and tool calls (`glm45` reasoning, `glm47` tool calls).

    output := [reason ("</think>" | &"<tool_call>")] (text | call)*        a thinking turn starts inside reason
    call   := "<tool_call>" name (pair)* "</tool_call>"
    pair   := "<arg_key>" key "</arg_key>" ws* "<arg_value>" value "</arg_value>" ws*

One machine serves streaming and not; what it says depends on the text alone, never on how the text was cut:
- a suffix that may be the beginning of a tag waits for the next piece;
- trailing whitespace of reasoning is dropped; whitespace at either end of the content is dropped once there is a call,
  except before text that was already told when the call came;
- a turn that starts without thinking has no reasoning: its think tags are text;
- a name is told once, whole, when its first argument or its end is seen; a call of an unknown tool is dropped;
- string values are told as they come, other types when complete (tool_types.py); a repeated key is told again, so that
  the last one wins in JSON;
- a call that the output's end cuts off stays cut off, as in OpenAI's API: a completed half could do harm.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from hetero_glm5.server.tool_types import Known, allowed_types, to_json

_STRING = frozenset({"string"})
_TAGS = {  # state: the tags that mean something in it; everything else is text
    "reasoning": ("</think>", "<tool_call>"),
    "content": ("</think>", "<tool_call>"),
    "name": ("<tool_call>", "<arg_key>", "</tool_call>"),
    "key": ("</arg_key>", "</tool_call>"),
    "gap": ("<arg_value>", "<arg_key>", "</tool_call>"),
    "value": ("</arg_value>",),
    "after": ("<arg_key>", "</tool_call>", "<tool_call>"),
}


@dataclass(frozen=True)
class Delta:
    """A piece of the message. `call` numbers the tool call that a name or an argument fragment belongs to."""

    kind: Literal["reasoning", "content", "name", "arguments"]
    text: str
    call: int = 0


class OutputParser:
    """Feed it text, then finish(). `thinking`: the prompt ended with <think>. Without `reasoning` or `tools` the
    respective tags are ordinary text. Unless `parallel`, calls after the first are dropped."""

    def __init__(self, *, thinking: bool, reasoning: bool, tools: list[dict[str, Any]] | None, parallel: bool = True):
        self._parameters = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools or ()}
        self._allowed: dict[tuple[str, str], frozenset[str]] = {}  # types, by tool and key
        self._references: dict[str, Known] = {}
        self._reasoning, self._tools, self._parallel = reasoning and thinking, tools is not None, parallel
        self._state = "reasoning" if self._reasoning else "content"
        self._at_start = self._reasoning  # a leading <think> is still possible
        self._buffer = ""  # text not told yet: it may be the beginning of a tag
        self._space = ""  # trailing whitespace of the reasoning or content so far
        self._told_content = False
        self._name = self._key = self._value = ""
        self._known = False  # the call in progress names a known tool
        self._first = True  # no pair of the call in progress has been told
        self._types = _STRING
        self._deltas: list[Delta] = []
        self.num_calls = 0

    @property
    def in_reasoning(self) -> bool:
        return self._state == "reasoning"

    def feed(self, text: str) -> list[Delta]:
        self._buffer += text
        if self._at_start:
            if len(self._buffer) < len("<think>") and "<think>".startswith(self._buffer):
                return []
            self._buffer = self._buffer.removeprefix("<think>")
            self._at_start = False
        done = 0
        while (tag := self._pattern.search(self._buffer, done)) is not None:
            self._on_text(self._buffer[done : tag.start()])
            done = tag.end()
            self._on_tag(tag.group())
        rest = self._buffer[done:]
        told = len(rest) - _partial_tag(rest, self._tags)
        self._buffer = rest[told:]
        self._on_text(rest[:told])
        return self._take()

    def finish(self) -> list[Delta]:
        """The end of the output: what waited for the rest of a tag is text."""
        self._at_start = False
        self._on_text(self._buffer)
        self._buffer = ""
        if self._state == "content" and self._space and not self.num_calls:
            self._tell("content", self._space)
        return self._take()

    @property
    def _tags(self) -> tuple[str, ...]:
        if self._state == "content":
            active = {"</think>": self._reasoning, "<tool_call>": self._tools}
            return tuple(tag for tag in _TAGS["content"] if active[tag])
        return _TAGS[self._state]

    @property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(self._tags) or r"(?!)")  # the latter matches nothing

    def _take(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def _tell(self, kind: Literal["reasoning", "content", "name", "arguments"], text: str) -> None:
        if text:
            self._deltas.append(Delta(kind, text, max(self.num_calls - 1, 0)))

    def _on_text(self, text: str) -> None:
        if self._state == "reasoning":
            self._tell_but_space("reasoning", text)
        elif self._state == "content":
            self._on_content(text)
        elif self._state == "name":
            self._name += text
        elif self._state == "key":
            self._key += text
        elif self._state == "value":
            self._on_value(text)

    def _tell_but_space(self, kind: Literal["reasoning", "content"], text: str) -> None:
        """Tells all but the trailing whitespace, which waits for more text."""
        text = self._space + text
        kept = text.rstrip()
        self._space = text[len(kept) :]
        self._tell(kind, kept)

    def _on_content(self, text: str) -> None:
        if not self._tools:
            self._tell("content", text)
            return
        if self.num_calls and not self._told_content:
            self._space, text = "", (self._space + text).lstrip()
        self._told_content = self._told_content or bool(text.strip())
        self._tell_but_space("content", text)

    def _on_value(self, text: str) -> None:
        if not self._known:
            return
        if self._types == _STRING:
            self._tell("arguments", json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            self._value += text

    def _on_tag(self, tag: str) -> None:
        if tag == "</think>":
            if self._state == "reasoning":
                self._end_reasoning()
        elif tag == "<tool_call>":
            self._open_call()
        elif tag == "</tool_call>":
            self._close_call()
        elif tag == "<arg_key>":
            if self._state == "name":
                self._tell_name()
            self._state, self._key = "key", ""
        elif tag == "</arg_key>":
            self._state = "gap"
        elif tag == "<arg_value>":
            self._open_value()
        elif tag == "</arg_value>":
            self._close_value()

    def _end_reasoning(self) -> None:
        self._state, self._space = "content", ""

    def _open_call(self) -> None:
        if self._state == "after":
            self._close_call()
        if self._state == "reasoning":
            self._end_reasoning()
            if not self._tools:
                self._on_content("<tool_call>")
                return
        self._state, self._name, self._known, self._first = "name", "", False, True

    def _tell_name(self) -> None:
        self._name = self._name.strip()
        self._known = self._name in self._parameters and (self._parallel or not self.num_calls)
        if self._known:
            self.num_calls += 1
            self._tell("name", self._name)

    def _close_call(self) -> None:
        if self._state == "name":
            self._tell_name()
        if self._known:
            self._tell("arguments", "{}" if self._first else "}")
        self._state = "content"

    def _open_value(self) -> None:
        self._state, self._value = "value", ""
        if not self._known:
            return
        key = self._key.strip()
        self._types = self._types_of(key)
        quote = '"' if self._types == _STRING else ""
        lead = "{" if self._first else ", "
        self._tell("arguments", f"{lead}{json.dumps(key, ensure_ascii=False)}: {quote}")
        self._first = False

    def _types_of(self, key: str) -> frozenset[str]:
        """What the schema of the call in progress allows as an argument."""
        at = (self._name, key)
        if at not in self._allowed:
            root = self._parameters[self._name]
            properties = root.get("properties") if isinstance(root, dict) else None
            schema = properties.get(key) if isinstance(properties, dict) else None
            self._allowed[at] = allowed_types(schema, root, self._references.setdefault(self._name, {}))
        return self._allowed[at]

    def _close_value(self) -> None:
        self._state = "after"
        if self._known:
            self._tell("arguments", '"' if self._types == _STRING else to_json(self._value, self._types))


def _partial_tag(text: str, tags: tuple[str, ...]) -> int:
    """Length of the longest suffix of `text` with which one of `tags` begins."""
    start = text.rfind("<")  # no tag has a second "<"
    return len(text) - start if start >= 0 and any(tag.startswith(text[start:]) for tag in tags) else 0


@dataclass
class ParsedMessage:
    """Deltas put together: the message of an answer that is not streamed."""

    reasoning: str = ""
    content: str = ""
    calls: list[list[str]] | None = None  # [name, arguments]

    def add(self, deltas: list[Delta]) -> None:
        self.reasoning += "".join(delta.text for delta in deltas if delta.kind == "reasoning")
        self.content += "".join(delta.text for delta in deltas if delta.kind == "content")
        of_calls = (delta for delta in deltas if delta.kind in ("name", "arguments"))
        for kind, run in groupby(of_calls, lambda delta: delta.kind):
            if kind == "name":
                self.calls = self.calls or []
                self.calls += [[delta.text, ""] for delta in run]
            else:
                assert self.calls is not None, "a name comes before its arguments"
                self.calls[-1][1] += "".join(delta.text for delta in run)
