"""The OpenAPI document: every route with what it takes, what it answers and every status that this can have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from hetero_glm5 import __version__
from hetero_glm5.server import answers
from hetero_glm5.server.anthropic_protocol import CountRequest, MessagesRequest
from hetero_glm5.server.generate import GenerateRequest
from hetero_glm5.server.native import (
    AbortRequest,
    DetokenizeRequest,
    ParseCallRequest,
    SeparateRequest,
    TokenizeRequest,
)
from hetero_glm5.server.openresponses_protocol import ResponsesRequest
from hetero_glm5.server.protocol import ChatRequest, CompletionRequest

_STATUSES = {
    400: "The request is wrong, or asks for what this server does not do; the message says what.",
    401: "The API key is missing or wrong.",
    403: "The Host header names none of --allowed-hosts.",
    404: "The model is not served.",
    413: "The body is too large.",
    429: "Too many requests wait.",
    500: "The engine failed.",
    503: "The model is loading, or the engine has ended.",
}
_EVERY = (401, 403)
_READS = (*_EVERY, 400, 413, 503)  # a body
_ASKS = (*_EVERY, 500, 503)  # the engine
_COMPUTES = (*_READS, 429, 500)


@dataclass(frozen=True)
class Route:
    summary: str
    answer: dict[str, Any] | None  # JSON schema; None: plain text
    statuses: tuple[int, ...]  # besides 200
    bodies: tuple[type[BaseModel], ...] = ()  # any of these
    streams: bool = False
    method: str = "post"


ROUTES = {
    "/v1/chat/completions": Route("OpenAI's chat", answers.CHAT, (*_COMPUTES, 404), (ChatRequest,), streams=True),
    "/v1/completions": Route(
        "OpenAI's completions", answers.COMPLETION, (*_COMPUTES, 404), (CompletionRequest,), streams=True
    ),
    "/v1/responses": Route(
        "OpenAI's Responses", answers.RESPONSE, (*_COMPUTES, 404), (ResponsesRequest,), streams=True
    ),
    "/v1/messages": Route("Anthropic's Messages", answers.MESSAGE, (*_COMPUTES, 404), (MessagesRequest,), streams=True),
    "/v1/messages/count_tokens": Route(
        "The tokens of a message's prompt", answers.COUNT, (*_READS, 404), (CountRequest,)
    ),
    "/generate": Route("SGLang's generate", answers.GENERATED, _COMPUTES, (GenerateRequest,), streams=True),
    "/v1/models": Route("The model", answers.CARDS, _EVERY, method="get"),
    "/v1/models/{name}": Route("The model of that name", answers.CARD, (*_EVERY, 404), method="get"),
    "/tokenize": Route("Text or a chat as tokens", answers.TOKENIZED, (*_READS, 404), (TokenizeRequest, ChatRequest)),
    "/detokenize": Route("Tokens as text", answers.DETOKENIZED, (*_READS, 404), (DetokenizeRequest,)),
    "/parse_function_call": Route("The tool calls in a text", answers.PARSED, _READS, (ParseCallRequest,)),
    "/separate_reasoning": Route("The reasoning in a text", answers.SEPARATED, _READS, (SeparateRequest,)),
    "/abort_request": Route("Ends requests", answers.ABORTED, _READS, (AbortRequest,)),
    "/flush_cache": Route("Forgets prefixes", answers.FLUSHED, _ASKS),
    "/health": Route("Whether the server is ready", answers.HEALTH, (403, 503), method="get"),
    "/health_generate": Route("Whether a token can be made", answers.HEALTH, (*_ASKS, 429), method="get"),
    "/metrics": Route("Metrics in Prometheus's format", None, _EVERY, method="get"),
    "/get_model_info": Route("What the model is", answers.MODEL_INFO, _ASKS, method="get"),
    "/get_server_info": Route("Flags and state", answers.SERVER_INFO, _ASKS, method="get"),
    "/server_info": Route("Flags and state", answers.SERVER_INFO, _ASKS, method="get"),
    "/start_expert_distribution_record": Route("Counts which experts are used", answers.RECORDING, (*_ASKS, 400)),
    "/stop_expert_distribution_record": Route("Stops counting", answers.RECORDING, (*_ASKS, 400)),
    "/dump_expert_distribution_record": Route("Writes the counts to a file", answers.DUMPED, (*_ASKS, 400)),
    "/openapi.json": Route("This document", answers.OBJECT, _EVERY, method="get"),
}


def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    models = list(dict.fromkeys(model for route in ROUTES.values() for model in route.bodies))
    references, schemas = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    named = {model: references[model, "validation"] for model in models}
    return {
        "openapi": "3.1.0",
        "info": {"title": "hetero_glm5", "version": __version__},
        "paths": {path: {route.method: _operation(path, route, named)} for path, route in ROUTES.items()},
        "components": {"schemas": schemas["$defs"]},
    }


def _operation(path: str, route: Route, named: dict[type[BaseModel], Any]) -> dict[str, Any]:
    answer: dict[str, Any] = {"text/plain": {}} if route.answer is None else _json(route.answer)
    if route.streams:
        answer["text/event-stream"] = {}
    error = answers.ANTHROPIC_ERROR if path.startswith("/v1/messages") else answers.ERROR
    told = {503: answers.ALIVE} if route.answer is answers.HEALTH else {}
    refused = {
        str(status): {"description": _STATUSES[status], "content": _json(told.get(status, error))}
        for status in sorted(route.statuses)
    }
    operation = {"summary": route.summary, "responses": {"200": {"description": "OK", "content": answer}, **refused}}
    if "{name}" in path:
        operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": answers.TEXT}]
    if route.bodies:
        schemas = [named[body] for body in route.bodies]
        operation["requestBody"] = {
            "required": True,
            "content": _json(schemas[0] if len(schemas) == 1 else {"anyOf": schemas}),
        }
    return operation


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
