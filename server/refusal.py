"""Answers that refuse a request before vLLM has seen it, in OpenAI's shape."""

from __future__ import annotations

import json

from starlette.responses import JSONResponse, Response

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    431: "HeadersTooLargeError",
}


def refusal_body(status: int, message: str, param: str | None = None) -> bytes:
    """`{"error": {"message", "type", "param", "code"}}`."""
    error = {"message": message, "type": TYPES[status], "param": param, "code": status}
    return json.dumps({"error": error}, separators=(",", ":")).encode()  # as vLLM writes it


def refuse(status: int, message: str, param: str | None = None, **headers: str) -> Response:
    """The answer, an ASGI application.

    Args:
        param: the request's field that is wrong.
        headers: more of them, `_` for `-`.
    """
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(refusal_body(status, message, param), status, named, JSONResponse.media_type)
