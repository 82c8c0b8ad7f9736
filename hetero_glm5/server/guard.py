"""Who may talk to the server, and what each request is called: the Host header, web pages' origins, X-Request-Id.

A server on localhost answers to localhost's names only: else a web page could reach it under a name of its own that
resolves there.
"""

from __future__ import annotations

import secrets
from typing import Any

import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hetero_glm5.config import ServerConfig
from hetero_glm5.server.errors import error_body, shaped

LOCAL = frozenset(("localhost", "127.0.0.1", "[::1]"))
LOCAL_ORIGIN = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?"
REQUEST_ID = "X-Request-Id"
MOST_ID_CHARACTERS = 200


class Guard:
    """hosts: allowed names without ports; None = any."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None):
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        name = _usable(headers.get(REQUEST_ID, "")) or secrets.token_hex(12)
        scope.setdefault("state", {})["request_id"] = name

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = name
            await send(message)

        host = _without_port(headers.get("host", ""))
        app = self._app if self._hosts is None or host in self._hosts else _refusal(host, scope["path"])
        await app(scope, receive, named)


def request_id(request: Request) -> str:
    """What its client calls the request, or a name of our own."""
    return request.state.request_id


def allowed_hosts(config: ServerConfig) -> frozenset[str] | None:
    """None = any."""
    if config.allowed_hosts is not None:
        return None if "*" in config.allowed_hosts else frozenset(map(_without_port, config.allowed_hosts))
    local = config.host in ("localhost", "::1") or config.host.startswith("127.")
    return LOCAL | {config.host} if local else None


def cross_origin(config: ServerConfig) -> dict[str, Any]:
    """Options for Starlette's CORS middleware."""
    options = {"allow_methods": ["*"], "allow_headers": ["*"], "expose_headers": [REQUEST_ID]}
    if config.allowed_origins is None:
        return options | {"allow_origin_regex": LOCAL_ORIGIN}
    return options | {"allow_origins": list(config.allowed_origins)}


def _usable(name: str) -> str:
    return name if name.isascii() and name.isprintable() and len(name) <= MOST_ID_CHARACTERS else ""


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() and not name.endswith(":") else host).lower()


def _refusal(host: str, path: str) -> Response:
    message = f"The Host header is {host[:100]!r}; this server does not answer to it. Name it in --allowed-hosts."
    body = error_body(message, "invalid_request_error", None, "unknown_host")
    return Response(orjson.dumps(shaped(path, 403, body)), 403, media_type="application/json")
