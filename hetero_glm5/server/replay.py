"""Turns as the model sampled them, so that a client's copy of one becomes the same tokens again.

A client sends an answer back as what it was told: parsed, and often serialised anew. Rendered from that, a turn differs
from the tokens in the cache wherever the model wrote `1e3` or `{"a":1}` or a line break that no parser tells, and
everything after it would be computed again. So what was sampled is kept, by the id of its first tool call or, without
calls, by its text. When messages become a prompt, a turn that says what was told is rendered with stand-ins, and what
was sampled takes their place: whatever the checkpoint's template does around a turn stays its own.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from typing import Any

from hetero_glm5.server.recent import Recent
from hetero_glm5.server.tokenizer import Tokenizer

MOST_CHARACTERS = 32 << 20  # of sampled text that is kept


@dataclass(frozen=True)
class SampledTurn:
    """A turn's text, and what the client was told of it."""

    text: str
    thinking: bool  # it began inside the reasoning
    reasoning: str
    content: str
    calls: tuple[tuple[str, str, str], ...]  # (id, name, arguments)

    @property
    def answer(self) -> str:
        """The text after the reasoning."""
        return re.split("</think>|(?=<tool_call>)", self.text, maxsplit=1)[-1] if self.thinking else self.text


class Replay:
    """The most recent turns, `most_characters` of text in all. Safe to use from several threads."""

    def __init__(self, most_characters: int = MOST_CHARACTERS):
        self._turns: Recent[SampledTurn] = Recent(most_characters)

    def remember(self, turn: SampledTurn) -> None:
        """Keeps it, unless the client was not told of a call, or not of all of it: then no result will come."""
        calls = [(name, {"name": called, "arguments": arguments}) for name, called, arguments in turn.calls]
        if turn.answer.count("<tool_call>") == len(calls) and _meaning(calls) is not None:
            self._turns.put(_key([name for name, _ in calls], turn.content), turn, len(turn.text))

    def find(self, message: dict[str, Any]) -> SampledTurn | None:
        """What was sampled for an assistant's message in OpenAI's form, if it still says what was told."""
        calls = [(call.get("id"), call["function"]) for call in message.get("tool_calls") or ()]
        content, reasoning = _text(message.get("content")), (message.get("reasoning_content") or "").strip()
        turn = self._turns.get(_key([name for name, _ in calls], content))
        if turn is None or content != turn.content.strip() or reasoning not in ("", turn.reasoning.strip()):
            return None
        told = [(name, {"name": called, "arguments": arguments}) for name, called, arguments in turn.calls]
        return turn if _meaning(calls) == _meaning(told) else None

    def render(
        self, tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, /, **kwargs: Any
    ) -> str:
        """The prompt for a chat, like Tokenizer.render_chat, with every turn that is known as it was sampled."""
        mark = secrets.token_hex(16)
        known = {i: turn for i, m in enumerate(messages) if m["role"] == "assistant" and (turn := self.find(m))}
        standing_in = [_stand_in(m, known[i], f"{mark}-{i}") if i in known else m for i, m in enumerate(messages)]
        text = tokenizer.render_chat(standing_in, tools, **kwargs)
        whole, answer = rf"{mark}-(\d+)-reasoning.*?{mark}-\1-answer", rf"{mark}-(\d+)-answer"
        text = re.sub(whole, lambda found: known[int(found[1])].text, text, flags=re.DOTALL)
        return re.sub(answer, lambda found: known[int(found[1])].answer, text)


def _key(call_ids: list[Any], content: str) -> str:
    return f"call {call_ids[0]}" if call_ids else f"text {content.strip()}"


def _text(content: Any) -> str:
    parts = content if isinstance(content, list) else [{"text": content or ""}]
    return "".join(part["text"] for part in parts).strip()


def _meaning(calls: list[tuple[Any, dict[str, Any]]]) -> list[tuple[Any, str, Any]] | None:
    """Calls to compare, however their JSON is written; None if it is none."""
    try:
        return [(name, called["name"], _object(called.get("arguments"))) for name, called in calls]
    except (ValueError, RecursionError):
        return None


def _object(arguments: Any) -> Any:
    return json.loads(arguments or "{}") if isinstance(arguments, str | None) else arguments


def _stand_in(message: dict[str, Any], turn: SampledTurn, mark: str) -> dict[str, Any]:
    """A turn without its reasoning is rendered without it too, unless there was none to send back."""
    stand_in = {"role": "assistant", "content": f"{mark}-answer"}
    if message.get("reasoning_content") or (turn.thinking and not turn.reasoning.strip()):
        stand_in["reasoning_content"] = f"{mark}-reasoning"
    return stand_in
