"""OpenAI's Responses API: /v1/responses and the events of its streams.

Answers are kept in memory, the most recent ones, so that `previous_response_id` can continue them; nothing outlives the
process, and an answer that is gone is a 400.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

from fastapi import APIRouter, Request, Response

from hetero_glm5.core import RequestError
from hetero_glm5.server.openresponses_protocol import ResponsesRequest, encoded
from hetero_glm5.server.recent import Recent
from hetero_glm5.server.responses import PING
from hetero_glm5.server.service import Service
from hetero_glm5.server.turn import Part, Turn, TurnTeller, answer, make_turn, named_event

MOST_CHARACTERS = 32 << 20  # of conversations that are kept
Messages = list[dict[str, Any]]


def responses_router(service: Service) -> APIRouter:
    kept: Recent[Messages] = Recent(MOST_CHARACTERS)

    async def responses(request: Request) -> Response:
        asked = await service.asked(ResponsesRequest, request)
        service.check_model(asked.model)
        before = _before(kept, asked.previous_response_id)
        turn = await make_turn(service, lambda: asked.asked(before, asked.sampling(service.defaults)), "call_")
        teller = ResponseTeller(turn, asked, service.model, before, kept if asked.store else None)
        return await answer(service, request, teller, streams=asked.stream)

    router = APIRouter()
    router.add_api_route("/v1/responses", responses, methods=["POST"])
    return router


def _before(kept: Recent[Messages], response_id: str | None) -> Messages:
    if response_id is None:
        return []
    messages = kept.get(response_id)
    if messages is None:
        raise RequestError(
            f"previous_response_id is {response_id[:100]!r}, which is not kept any more, or never was. Send the whole "
            "conversation as input.",
            "previous_response_id",
        )
    return messages


class ResponseTeller(TurnTeller):
    """A turn as a response, or as the events that build it. A finished one goes to `kept`."""

    ping = PING

    def __init__(
        self, turn: Turn, asked: ResponsesRequest, model: str, before: Messages, kept: Recent[Messages] | None
    ):
        self.turn, self._asked, self._model, self._before, self._kept = turn, asked, model, before, kept
        self.id, self._created, self._sent = f"resp_{secrets.token_hex(12)}", int(time.time()), 0

    def opening(self) -> list[bytes]:
        begun = self._response("in_progress")
        return [self._event("response.created", response=begun), self._event("response.in_progress", response=begun)]

    def say(self, what: str, part: Part, text: str) -> list[bytes]:
        at: dict[str, Any] = {"output_index": part.index}
        inside = at | {"item_id": _item_id(part)}
        if part.kind != "call":
            inside["content_index"] = 0
        if what == "more":
            return [self._event(f"{_TEXT_EVENTS[part.kind]}.delta", **inside, **_EXTRA.get(part.kind, {}), delta=text)]
        if what == "open":
            events = [self._event("response.output_item.added", **at, item=_empty_item(part))]
            if part.kind != "call":
                events.append(self._event("response.content_part.added", **inside, part=_content(part, "")))
            return events
        said = {"arguments": part.text, "name": part.name} if part.kind == "call" else {"text": part.text}
        events = [self._event(f"{_TEXT_EVENTS[part.kind]}.done", **inside, **_EXTRA.get(part.kind, {}), **said)]
        if part.kind != "call":
            events.append(self._event("response.content_part.done", **inside, part=_content(part, part.text)))
        return [*events, self._event("response.output_item.done", **at, item=self._item(part))]

    def closing(self) -> list[bytes]:
        whole = self.whole()
        return [self._event(f"response.{whole['status']}", response=whole)]

    def failed(self, error: dict[str, Any]) -> bytes:
        told = {"code": error["code"] or "server_error", "message": error["message"]}
        return self._event("response.failed", response=self._response("failed") | {"error": told})

    def whole(self) -> dict[str, Any]:
        finished = self.turn.finish_reason == "stop"
        if finished and self._kept is not None:
            conversation = [*self._before, *self._asked.input, _message(self.turn.parts)]
            self._kept.put(self.id, conversation, sum(map(_size, conversation)))
        return self._response("completed" if finished else "incomplete")

    def _response(self, status: str) -> dict[str, Any]:
        asked = self._asked
        reason = {"reason": "max_output_tokens"} if self.turn.finish_reason == "length" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": reason,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata,
            "model": self._model,
            "output": [self._item(part) for part in self.turn.parts] if status != "in_progress" else [],
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": asked.reasoning.effort, "summary": None},
            "store": self._kept is not None,
            "temperature": self.turn.params.temperature,
            "text": {"format": asked.text.format.told},
            "tool_choice": _told_choice(asked.tool_choice),
            "tools": [{"type": "function", "strict": False, **tool["function"]} for tool in asked.tools],
            "top_p": self.turn.params.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else self._usage,
        }

    @property
    def _usage(self) -> dict[str, Any]:
        usage = self.turn.usage
        return {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning},
            "total_tokens": usage.prompt + usage.completion,
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        number, self._sent = self._sent, self._sent + 1
        return named_event({"type": kind, "sequence_number": number, **fields})

    def _item(self, part: Part) -> dict[str, Any]:
        """A part as an output item, after its end: what the answer's end cut off is incomplete."""
        cut = self.turn.finish_reason != "stop" and part is self.turn.parts[-1]
        item = _empty_item(part) | {"status": "incomplete" if cut else "completed"}
        if part.kind == "call":
            return item | {"arguments": part.text}
        secret = {"encrypted_content": encoded(part.text)} if part.kind == "reasoning" else {}
        return item | {"content": [_content(part, part.text)]} | secret


def _told_choice(choice: dict[str, Any]) -> Any:
    return {"type": "function", "name": choice["names"][0]} if choice["mode"] == "only" else choice["mode"]


_TEXT_EVENTS = {
    "reasoning": "response.reasoning_text",
    "content": "response.output_text",
    "call": "response.function_call_arguments",
}
_EXTRA: dict[str, dict[str, Any]] = {"content": {"logprobs": []}}
_PREFIXES = {"reasoning": "rs_", "content": "msg_", "call": "fc_"}


def _item_id(part: Part) -> str:
    return _PREFIXES[part.kind] + part.id.removeprefix("call_")


def _content(part: Part, text: str) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _empty_item(part: Part) -> dict[str, Any]:
    item: dict[str, Any] = {"id": _item_id(part), "status": "in_progress"}
    if part.kind == "reasoning":
        return item | {"type": "reasoning", "summary": [], "content": []}
    if part.kind == "content":
        return item | {"type": "message", "role": "assistant", "content": []}
    return item | {"type": "function_call", "call_id": part.id, "name": part.name, "arguments": ""}


def _message(parts: list[Part]) -> dict[str, Any]:
    """The turn as a chat message."""
    text = {kind: "".join(part.text for part in parts if part.kind == kind) for kind in ("content", "reasoning")}
    message: dict[str, Any] = {"role": "assistant", "content": text["content"]}
    if text["reasoning"]:
        message["reasoning_content"] = text["reasoning"]
    if calls := [part for part in parts if part.kind == "call" and part.arguments is not None]:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.text}}
            for call in calls
        ]
    return message


def _size(message: dict[str, Any]) -> int:
    """Characters that it holds, and something for each of its parts."""
    calls = message.get("tool_calls", ())
    texts = [text for name, text in message.items() if name != "tool_calls"]
    texts += [text for call in calls for text in (call["id"], *call["function"].values())]
    return 100 * (1 + len(calls)) + sum(map(len, texts))
