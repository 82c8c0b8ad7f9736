"""What can go wrong with a request, and how each is told: one table for status lines and for streams."""

from __future__ import annotations

from typing import Any

from hetero_glm5.core import PromptTooLong, QueueFull, RequestError

TOO_LONG = "context_length_exceeded"


class UnknownModel(RequestError):
    """The request names a model that is not served."""


class NotReady(Exception):
    """The engine is still loading, or has ended."""


class GenerationFailed(Exception):
    """The engine could not finish this request."""


KNOWN: dict[type[Exception], tuple[int, str, str | None]] = {  # HTTP status, OpenAI's type and code
    RequestError: (400, "invalid_request_error", None),
    PromptTooLong: (400, "invalid_request_error", TOO_LONG),
    UnknownModel: (404, "invalid_request_error", "model_not_found"),
    QueueFull: (429, "rate_limit_error", "queue_full"),
    NotReady: (503, "server_error", "not_ready"),
    GenerationFailed: (500, "server_error", "generation_failed"),
}

ANTHROPIC = "/v1/messages"  # begins the paths of Anthropic's API
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def shaped(path: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    """An error in OpenAI's shape in that of the API that `path` belongs to."""
    return anthropic_error(status, body["error"]) if path.startswith(ANTHROPIC) else body


def anthropic_error(status: int, error: dict[str, Any]) -> dict[str, Any]:
    """`error` is OpenAI's. Claude Code looks for Anthropic's own words when a conversation has grown too long."""
    message = f"prompt is too long: {error['message']}" if error["code"] == TOO_LONG else error["message"]
    return {"type": "error", "error": {"type": _ANTHROPIC_TYPES.get(status, "api_error"), "message": message}}


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    sendable = message.encode("utf-8", "replace").decode()  # it may quote half a surrogate pair, which no JSON can hold
    return {"error": {"message": sendable, "type": kind, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of an error of a KNOWN type or one derived from it."""
    status, kind, code = next(KNOWN[known] for known in type(error).__mro__ if known in KNOWN)
    param = error.param if isinstance(error, RequestError) else None
    return status, error_body(str(error), kind, param, code)


def bug_body(error: Exception) -> dict[str, Any]:
    """For an error of no KNOWN type."""
    return error_body(f"Internal error: {type(error).__name__}: {error}", "server_error")
