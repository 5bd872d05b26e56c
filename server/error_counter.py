"""Counts requests that are answered with an error, around everything else: authentication too."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.metrics import ErrorMetrics
from server.scope import FIELDS

UNCOUNTED = ("/health", "/load", "/metrics", "/ping", "/ready", "/server_info", "/version")
"""Routes that monitoring asks; vLLM's own counts of HTTP requests leave them out too."""
_STREAMED = re.compile(rb'^data: (\{"(?:error":|type": ?"error").*)', re.MULTILINE)
"""An error as a line of an event stream: OpenAI's or Anthropic's. Inside a text the quotes would be escaped."""


@cache
def error_metrics() -> ErrorMetrics:
    """The process's own: servers that follow each other in one process count on."""
    return ErrorMetrics(FIELDS)


class ErrorCounter:
    """An ASGI middleware; answers pass through as they are.

    An error that ends a stream is counted by the code it names, since the status was sent long before.
    """

    def __init__(self, app: ASGIApp, metrics: ErrorMetrics | None = None) -> None:
        self.app = app
        self.metrics = metrics or error_metrics()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNCOUNTED:
            return await self.app(scope, receive, send)
        status, body = 200, b""

        async def look(message: Message) -> None:
            nonlocal status, body
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                part = message.get("body", b"")
                if status >= 400:
                    body += part
                    if not message.get("more_body", False):
                        self.metrics.count(status, _error(body).get("param"))
                elif line := _STREAMED.search(part):
                    error = _error(line[1])
                    code = error.get("code")
                    self.metrics.count(code if isinstance(code, int) else 500, error.get("param"))
            await send(message)

        try:
            await self.app(scope, receive, look)
        except Exception:
            if status < 400:  # starlette answers with a 500, outside of us, or the stream breaks
                self.metrics.count(500)
            raise


def _error(data: bytes) -> dict[str, Any]:
    """OpenAI's `error` object; empty where there is none."""
    try:
        error = json.loads(data)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return error if isinstance(error, dict) else {}
