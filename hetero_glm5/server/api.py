"""The HTTP API put together: routes, errors, limits and keys."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from hetero_glm5.server.anthropic_api import messages_router
from hetero_glm5.server.errors import KNOWN, bug_body, describe, error_body, shaped
from hetero_glm5.server.guard import Guard, allowed_hosts, cross_origin
from hetero_glm5.server.native import Native
from hetero_glm5.server.openapi import document
from hetero_glm5.server.openresponses_api import responses_router
from hetero_glm5.server.responses import json_response
from hetero_glm5.server.service import RETRY_SECONDS, Service


def create_app(service: Service) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await service.worker.stop()

    app = FastAPI(title="hetero_glm5", lifespan=lifespan, openapi_url=None)
    app.add_middleware(CORSMiddleware, **cross_origin(service.config))
    app.add_middleware(Guard, hosts=allowed_hosts(service.config))  # added last, it comes first
    app.add_api_route("/health", service.health)
    guarded = APIRouter(dependencies=[Depends(_key_check(service.config.api_key))])
    guarded.add_api_route("/v1/models", service.models)
    guarded.add_api_route("/v1/models/{name:path}", service.one_model)
    guarded.add_api_route("/v1/completions", service.completions, methods=["POST"])
    guarded.add_api_route("/v1/chat/completions", service.chat, methods=["POST"])
    guarded.include_router(messages_router(service))
    guarded.include_router(responses_router(service))
    guarded.add_api_route("/start_expert_distribution_record", service.start_recording, methods=["POST"])
    guarded.add_api_route("/stop_expert_distribution_record", service.stop_recording, methods=["POST"])
    guarded.add_api_route("/dump_expert_distribution_record", service.dump_recording, methods=["POST"])
    Native(service).add_routes(guarded)
    guarded.add_api_route("/openapi.json", _openapi)
    app.include_router(guarded)
    for kind in KNOWN:
        app.add_exception_handler(kind, _known_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _bug)
    return app


def _key_check(key: str | None) -> Any:
    async def check(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ") or request.headers.get("x-api-key", "")
        if key is not None and not hmac.compare_digest(given.encode("latin-1"), key.encode()):  # headers are bytes
            raise HTTPException(401, "The API key is missing or wrong: send Authorization: Bearer KEY.")

    return check


async def _openapi() -> Response:
    return json_response(document())


async def _known_error(request: Request, error: Exception) -> Response:
    status, body = describe(error)
    return _refused(request, status, body, {"Retry-After": RETRY_SECONDS} if status in (429, 503) else None)


async def _http_error(request: Request, error: Any) -> Response:
    """Routing errors: 404, 405, and those that this file raises."""
    where = f"{request.method} {request.url.path}"
    sentences = {404: f"{where} is not a route of this server.", 405: f"{where}: this method is not allowed here."}
    codes = {401: "invalid_api_key", 404: "unknown_route", 405: "method_not_allowed", 413: "body_too_large"}
    message = sentences.get(error.status_code, str(error.detail))
    body = error_body(message, "invalid_request_error", None, codes.get(error.status_code))
    return _refused(request, error.status_code, body, error.headers)


async def _bug(request: Request, error: Exception) -> Response:
    return _refused(request, 500, bug_body(error))


def _refused(request: Request, status: int, body: dict[str, Any], headers: Any = None) -> Response:
    return json_response(shaped(request.url.path, status, body), status, headers)


async def _gone(request: Request, error: Exception) -> Response:
    """The client left while it sent its request: nobody reads this."""
    return Response(status_code=499)
