"""What the server answers, in OpenAI's shapes: whole answers and the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson
from starlette.responses import Response

from hetero_glm5.server.parsers import Delta, ParsedMessage


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, media_type="application/json")


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


@dataclass
class Usage:
    """Tokens of one answer. `reasoning` is None when no parser tells reasoning apart."""

    prompt: int
    completion: int = 0
    cached: int = 0  # of the prompt's
    reasoning: int | None = None

    def as_dict(self) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
        if self.reasoning is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.reasoning}
        return usage


Kind = Literal["chat.completion", "text_completion"]


@dataclass(frozen=True)
class Answer:
    """What all parts of one answer share. `kind` is OpenAI's object name: chat.completion or text_completion."""

    model: str
    kind: Kind
    token: str = field(default_factory=lambda: secrets.token_hex(12))  # the request's id
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def chat(self) -> bool:
        return self.kind == "chat.completion"

    @property
    def id(self) -> str:
        return f"{'chatcmpl' if self.chat else 'cmpl'}-{self.token}"

    def whole(self, choices: list[dict[str, Any]], usage: Usage, timings: dict[str, float]) -> dict[str, Any]:
        return self._part(self.kind, choices) | {"usage": usage.as_dict(), "timings": timings}

    def chunk(self, choices: list[dict[str, Any]]) -> bytes:
        return event(self._part(self._chunk_kind, choices))

    def usage_chunk(self, usage: Usage, timings: dict[str, float]) -> bytes:
        return event(self._part(self._chunk_kind, []) | {"usage": usage.as_dict(), "timings": timings})

    @property
    def _chunk_kind(self) -> str:
        return f"{self.kind}.chunk" if self.chat else self.kind

    def _part(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def text_choice(index: int, text: str, finish_reason: str | None, logprobs: Any = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def chat_choice(
    index: int, message: ParsedMessage, call_ids: list[str], finish_reason: str, logprobs: Any = None
) -> dict[str, Any]:
    body: dict[str, Any] = {"role": "assistant", "content": message.content or None}
    if message.reasoning:
        body["reasoning_content"] = message.reasoning
    if message.calls:
        body["tool_calls"] = [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for call_id, (name, arguments) in zip(call_ids, message.calls, strict=True)
        ]
    return {"index": index, "message": body, "logprobs": logprobs, "finish_reason": finish_reason}


def chat_chunk_choice(
    index: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def chat_delta(delta: Delta, call_ids: list[str]) -> dict[str, Any]:
    """A tool call's id, type and name come once, with its first fragment; then only arguments."""
    if delta.kind == "reasoning":
        return {"reasoning_content": delta.text}
    if delta.kind == "content":
        return {"content": delta.text}
    if delta.kind == "arguments":
        return {"tool_calls": [{"index": delta.call, "function": {"arguments": delta.text}}]}
    function = {"name": delta.text, "arguments": ""}
    call_id = call_ids[delta.call]
    return {"tool_calls": [{"index": delta.call, "id": call_id, "type": "function", "function": function}]}


def new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
