"""Anthropic's Messages API: /v1/messages and /v1/messages/count_tokens, and their events."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from hetero_glm5.core import SamplingParams
from hetero_glm5.server.anthropic_protocol import CountRequest, MessagesRequest
from hetero_glm5.server.errors import ANTHROPIC, anthropic_error
from hetero_glm5.server.responses import json_response
from hetero_glm5.server.service import Service
from hetero_glm5.server.turn import Part, Turn, TurnTeller, answer, make_turn, named_event

CALL = "toolu_"  # begins the ids of tool calls
SIGNATURE = "none"  # of thinking: nothing is signed, but some clients drop what has none
_REASONS = {"length": "max_tokens"}  # every other end is an end_turn


def messages_router(service: Service) -> APIRouter:
    async def messages(request: Request) -> Response:
        asked = await service.asked(MessagesRequest, request)
        service.check_model(asked.model)
        turn = await make_turn(service, lambda: asked.asked(asked.sampling(service.defaults)), CALL)
        return await answer(service, request, MessageTeller(turn, service.model), streams=asked.stream)

    async def count_tokens(request: Request) -> Response:
        asked = await service.asked(CountRequest, request)
        service.check_model(asked.model)
        turn = await make_turn(service, lambda: asked.asked(SamplingParams()), CALL)
        return json_response({"input_tokens": len(turn.prompt)})

    router = APIRouter()
    router.add_api_route(ANTHROPIC, messages, methods=["POST"])
    router.add_api_route(f"{ANTHROPIC}/count_tokens", count_tokens, methods=["POST"])
    return router


class MessageTeller(TurnTeller):
    """A turn as a message, or as the events that build it."""

    ping = named_event({"type": "ping"})

    def __init__(self, turn: Turn, model: str):
        self.turn, self._model, self.id = turn, model, f"msg_{secrets.token_hex(12)}"

    def opening(self) -> list[bytes]:
        return [named_event({"type": "message_start", "message": self._message([])})]

    def say(self, what: str, part: Part, text: str) -> list[bytes]:
        return [named_event(event) for event in _events(what, part, text)]

    def closing(self) -> list[bytes]:
        delta = {"stop_reason": self._reason, "stop_sequence": self.turn.stop_string}
        events: list[dict[str, Any]] = [
            {"type": "message_delta", "delta": delta, "usage": self._usage},
            {"type": "message_stop"},
        ]
        return [named_event(event) for event in events]

    def failed(self, error: dict[str, Any]) -> bytes:
        return named_event(anthropic_error(500, error))

    def whole(self) -> dict[str, Any]:
        return self._message([block for part in self.turn.parts if (block := _block(part)) is not None])

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": self._reason,
            "stop_sequence": self.turn.stop_string,
            "usage": self._usage,
        }

    @property
    def _reason(self) -> str | None:
        turn = self.turn
        if turn.finish_reason is None:
            return None
        if turn.stop_string is not None:
            return "stop_sequence"
        return "tool_use" if turn.called else _REASONS.get(turn.finish_reason, "end_turn")

    @property
    def _usage(self) -> dict[str, Any]:
        """How much of the prompt was cached is known at the end; until then none of it counts as cached."""
        usage = self.turn.usage
        return {
            "input_tokens": usage.prompt - usage.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached,
            "output_tokens": usage.completion,
            "output_tokens_details": {"thinking_tokens": usage.reasoning},
        }


def _block(part: Part) -> dict[str, Any] | None:
    """A part as a content block; None for a call that was cut off, which no JSON object could say."""
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": part.text, "signature": SIGNATURE}
    if part.kind == "content":
        return {"type": "text", "text": part.text}
    if part.arguments is None:
        return None
    return {"type": "tool_use", "id": part.id, "name": part.name, "input": part.arguments}


def _events(what: str, part: Part, text: str) -> list[dict[str, Any]]:
    at: dict[str, Any] = {"index": part.index}
    if what == "open":
        return [{"type": "content_block_start", **at, "content_block": _EMPTY[part.kind](part)}]
    if what == "more":
        kind, key = _DELTAS[part.kind]
        return [{"type": "content_block_delta", **at, "delta": {"type": kind, key: text}}]
    signed = {"type": "signature_delta", "signature": SIGNATURE}
    signing = [{"type": "content_block_delta", **at, "delta": signed}] if part.kind == "reasoning" else []
    return [*signing, {"type": "content_block_stop", **at}]


_EMPTY: dict[str, Callable[[Part], dict[str, Any]]] = {
    "reasoning": lambda part: {"type": "thinking", "thinking": "", "signature": ""},
    "content": lambda part: {"type": "text", "text": ""},
    "call": lambda part: {"type": "tool_use", "id": part.id, "name": part.name, "input": {}},
}
_DELTAS = {
    "reasoning": ("thinking_delta", "thinking"),
    "content": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}
