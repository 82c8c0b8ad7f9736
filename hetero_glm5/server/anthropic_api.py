"""Anthropic's Messages API: /v1/messages and /v1/messages/count_tokens, their events and the shape of their errors."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from hetero_glm5.core import SamplingParams
from hetero_glm5.server.anthropic_protocol import CountRequest, MessagesRequest
from hetero_glm5.server.errors import KNOWN, describe, error_body
from hetero_glm5.server.protocol import parse_request
from hetero_glm5.server.service import RETRY_SECONDS, Service, json_response
from hetero_glm5.server.turn import Change, Part, Turn, answer, make_turn, named_event

CALL = "toolu_"  # begins the ids of tool calls
SIGNATURE = "none"  # of thinking: nothing is signed, but some clients drop what has none
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_REASONS = {"length": "max_tokens"}  # every other end is an end_turn


def messages_router(service: Service) -> APIRouter:
    async def messages(request: Request) -> Response:
        asked = parse_request(MessagesRequest, await service.body(request))
        service.check_model(asked.model)
        turn = await make_turn(service, asked.asked(asked.sampling(service.defaults)), CALL)
        return await answer(service, request, MessageTeller(turn, service.model), streams=asked.stream)

    async def count_tokens(request: Request) -> Response:
        asked = parse_request(CountRequest, await service.body(request))
        service.check_model(asked.model)
        turn = await make_turn(service, asked.asked(SamplingParams()), CALL)
        return json_response({"input_tokens": len(turn.prompt)})

    router = APIRouter(route_class=AnthropicRoute)
    router.add_api_route("/v1/messages", messages, methods=["POST"])
    router.add_api_route("/v1/messages/count_tokens", count_tokens, methods=["POST"])
    return router


class AnthropicRoute(APIRoute):
    """Tells whatever goes wrong before an answer begins in Anthropic's shape."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_or_tell(request: Request) -> Response:
            try:
                return await handle(request)
            except tuple(KNOWN) as error:
                status, body = describe(error)
            except HTTPException as error:
                status, body = error.status_code, error_body(str(error.detail), "")
            retry = {"Retry-After": RETRY_SECONDS} if status in (429, 503) else None
            return json_response(_error(body["error"], status), status, retry)

        return handle_or_tell


class MessageTeller:
    """A turn as a message, or as the events that build it."""

    ping = named_event({"type": "ping"})

    def __init__(self, turn: Turn, model: str):
        self.turn, self._model, self.id = turn, model, f"msg_{secrets.token_hex(12)}"

    def opening(self) -> list[bytes]:
        return [named_event({"type": "message_start", "message": self._message([])})]

    def tell(self, changes: list[Change]) -> list[bytes]:
        return [named_event(event) for change in changes for event in _events(*change)]

    def closing(self) -> list[bytes]:
        delta = {"stop_reason": self._reason, "stop_sequence": self.turn.stop_string}
        events: list[dict[str, Any]] = [
            {"type": "message_delta", "delta": delta, "usage": self._usage},
            {"type": "message_stop"},
        ]
        return [named_event(event) for event in events]

    def failed(self, error: dict[str, Any]) -> bytes:
        return named_event(_error(error, 500))

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


def _events(change: str, part: Part, text: str) -> list[dict[str, Any]]:
    at: dict[str, Any] = {"index": part.index}
    if change == "open":
        return [{"type": "content_block_start", **at, "content_block": _EMPTY[part.kind](part)}]
    if change == "more":
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


def _error(error: dict[str, Any], status: int) -> dict[str, Any]:
    """Anthropic's shape of an error that is told in OpenAI's."""
    return {"type": "error", "error": {"type": _ERRORS.get(status, "api_error"), "message": error["message"]}}
