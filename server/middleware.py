"""The `kv_cache` field of requests and answers, around vLLM's own handlers."""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvcache.registry import PolicyError
from server.policies import PolicyDesk
from server.scope import RequestScope, current_scope, merge_usage

FIELD = "kv_cache"


def error_response(error: PolicyError) -> JSONResponse:
    """OpenAI's error shape, status 400."""
    body = {"message": str(error), "type": "BadRequestError", "param": error.field, "code": 400}
    return JSONResponse({"error": body}, status_code=400)


class KVCacheMiddleware:
    """Takes `kv_cache` out of JSON requests, checks it, and adds `usage.kv_cache` to the answers.

    Requests without the field and answers without usage pass through as they are.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        request = RequestScope()
        if "json" in Headers(scope=scope).get("content-type", ""):
            desk: PolicyDesk = scope["app"].state.kv_policies
            body, messages = await _read(receive)
            if FIELD.encode() in body:
                try:
                    body, request.kv_cache = _take_field(body, desk)
                except PolicyError as error:
                    return await error_response(error)(scope, receive, send)
                scope = {**scope, "headers": _with_length(scope, len(body))}
            receive = _replay(body, messages, receive)
        token = current_scope.set(request)
        try:
            await self.app(scope, receive, _AnswerEditor(request, send))
        finally:
            current_scope.reset(token)


async def _read(receive: Receive) -> tuple[bytes, list[Message]]:
    """The whole body, and messages that are no body (a disconnect) to hand on."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(parts), [message]
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts), []


def _replay(body: bytes, messages: list[Message], receive: Receive) -> Receive:
    queue: list[Message] = [{"type": "http.request", "body": body, "more_body": False}, *messages]

    async def replay() -> Message:
        return queue.pop(0) if queue else await receive()

    return replay


def _take_field(body: bytes, desk: PolicyDesk) -> tuple[bytes, dict[str, Any] | None]:
    """The body without the field, and the checked policy. A body that isn't a JSON object is vLLM's to refuse.

    Raises:
        PolicyError: the field is wrong.
    """
    try:
        content = json.loads(body)
    except ValueError:
        return body, None
    if not isinstance(content, dict):
        return body, None
    if isinstance(content.get("vllm_xargs"), dict) and FIELD in content["vllm_xargs"]:
        raise PolicyError("vllm_xargs.kv_cache", "is not read.", "the field `kv_cache` of the request itself")
    if content.get(FIELD) is None:
        return body, None
    if content.get("use_beam_search"):
        raise PolicyError(FIELD, "beam search starts a new prompt for every token.", "requests without beam search")
    words = desk.check(content.pop(FIELD))
    return json.dumps(content, ensure_ascii=False).encode(), words


def _with_length(scope: Scope, length: int) -> list[tuple[bytes, bytes]]:
    return [
        (name, str(length).encode() if name.lower() == b"content-length" else value) for name, value in scope["headers"]
    ]


class _AnswerEditor:
    """Adds `usage.kv_cache` to a JSON answer, or to the events of a stream that carry usage."""

    def __init__(self, request: RequestScope, send: Send) -> None:
        self.request, self.send = request, send
        self.start: Message | None = None
        self.kind = ""
        self.rest = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.kind = Headers(raw=message["headers"]).get("content-type", "").partition(";")[0]
            if self.kind == "application/json":
                self.start = message  # its length isn't known yet
                return
        elif message["type"] == "http.response.body":
            last = not message.get("more_body", False)
            if self.kind == "application/json":
                self.rest += message.get("body", b"")
                return await self._answer() if last else None
            if self.kind == "text/event-stream":
                message = {**message, "body": self._events(message.get("body", b""), last)}
        await self.send(message)

    async def _answer(self) -> None:
        assert self.start is not None
        body = self._edited(self.rest)
        MutableHeaders(raw=self.start["headers"])["content-length"] = str(len(body))
        await self.send(self.start)
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    def _events(self, data: bytes, last: bool) -> bytes:
        """Whole events, edited; a part of one waits for the rest."""
        if not self.rest and b'"usage"' not in data and data.endswith(b"\n\n"):
            return data  # nearly every token of every stream
        *events, self.rest = (self.rest + data).split(b"\n\n")
        if last and self.rest:
            events, self.rest = [*events, self.rest], b""
        return b"".join(self._event(event) + b"\n\n" for event in events)

    def _event(self, event: bytes) -> bytes:
        lines = event.split(b"\n")
        return b"\n".join(b"data: " + self._edited(line[6:]) if line.startswith(b"data: {") else line for line in lines)

    def _edited(self, data: bytes) -> bytes:
        """A JSON object with `kv_cache` in its usage, at the top or in a Responses event's `response`."""
        if not self.request.usage or b'"usage"' not in data:
            return data
        content = json.loads(data)
        for holder in (content, content.get("response")):
            if isinstance(holder, dict) and isinstance(holder.get("usage"), dict):
                holder["usage"][FIELD] = merge_usage(self.request.usage)
                return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        return data
