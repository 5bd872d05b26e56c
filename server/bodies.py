"""Reads bodies of requests within limits of size, time and shape, before anything else is done with them."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.limits import BYTES_PER_SECOND, MOST_NESTED, Limits
from server.refusal import refuse
from server.strict_json import BadJSON, read_json

CONTENT = "longreach.json"
"""Where the rest of the application finds what a JSON body says, in the request's scope."""
_BODILESS = {"GET", "HEAD", "OPTIONS"}


class BodyMiddleware:
    """Answers 413 to a body that is too large, as soon as that is known, 408 to one that comes too slowly, 400 to one
    that says it is JSON and isn't. Handlers get it in one piece. Answers aren't touched."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _BODILESS:
            return await self.app(scope, receive, send)
        limits: Limits = scope["app"].state.longreach_limits
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        if int(length if length.isdecimal() else 0) > limits.body_bytes:
            return await _too_large(limits)(scope, receive, send)
        read = await _read(receive, limits)
        if isinstance(read, Response):
            return await read(scope, receive, send)
        body, ending = read
        if body.strip() and not ending and "json" in headers.get("content-type", "").lower():
            try:
                scope = {**scope, CONTENT: read_json(body, MOST_NESTED)}
            except BadJSON as error:
                return await refuse(400, str(error), error.param)(scope, receive, send)
        await self.app(scope, replay(body, ending, receive), send)


async def _read(receive: Receive, limits: Limits) -> tuple[bytes, list[Message]] | Response:
    """The body, and what came instead of its end: a disconnect, or nothing. Or why it isn't read to its end."""
    parts: list[bytes] = []
    size = 0
    loop = asyncio.get_running_loop()
    begin = loop.time()
    while True:
        try:
            async with asyncio.timeout_at(begin + limits.client_seconds + size / BYTES_PER_SECOND):
                message = await receive()
        except TimeoutError:
            return refuse(408, f"The body didn't come within {loop.time() - begin:.0f} s.", connection="close")
        if message["type"] != "http.request":
            return b"".join(parts), [message]
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limits.body_bytes:
            return _too_large(limits)
        if not message.get("more_body", False):
            return b"".join(parts), []


def _too_large(limits: Limits) -> Response:
    return refuse(413, f"The body is larger than {limits.body_bytes} bytes (the server's --max-body-bytes).")


def replay(body: bytes, ending: list[Message], receive: Receive) -> Receive:
    """A `receive` that gives this body in one piece, then what came instead of its end, then what `receive` gives."""
    queue: list[Message] = [{"type": "http.request", "body": body, "more_body": bool(ending)}, *ending]

    async def replay() -> Message:
        return queue.pop(0) if queue else await receive()

    return replay
