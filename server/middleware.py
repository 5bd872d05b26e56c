"""Longreach's fields of requests and answers (`kv_cache` and its like), around vLLM's own handlers."""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvcache.method import PolicyError
from server.bodies import CONTENT, replay
from server.desks import BEAM, Desks
from server.refusal import refuse
from server.scope import RequestScope, current_scope


class FieldsMiddleware:
    """Takes our fields out of JSON requests, checks them, and adds fields of the same names to the answers' usage.

    Requests without the fields and answers without usage pass through as they are. Bodies are read by `BodyMiddleware`,
    which runs around this one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        request = RequestScope()
        editor: Send = _AnswerEditor(request, send)
        desks: Desks = scope["app"].state.longreach_desks
        content = _object_with(scope.get(CONTENT), *desks.fields, BEAM)
        try:
            desks.refuse_misspelt(_object(scope.get(CONTENT)))
            request.words = desks.take(content) if content else {}
        except PolicyError as error:
            return await refuse(400, str(error), error.field)(scope, receive, send)
        if content:
            body = json.dumps(content).encode()
            scope = {**scope, "headers": _with_length(scope, len(body))}
            await receive()  # what it stands for
            receive = replay(body, [], receive)
            if content.get(BEAM):
                editor = send  # its many engine requests add up to nothing that a client could read
        token = current_scope.set(request)
        try:
            await self.app(scope, receive, editor)
        finally:
            current_scope.reset(token)


def _object(content: Any) -> dict[str, Any]:
    return content if isinstance(content, dict) else {}


def _object_with(content: Any, *names: str) -> dict[str, Any] | None:
    """What a body says if it is an object with one of these fields. What isn't an object is vLLM's to refuse."""
    return content if isinstance(content, dict) and _fields(content) & set(names) else None


def _fields(content: dict[str, Any]) -> set[str]:
    """Names of the request's own fields and of vLLM's extra ones."""
    extra = content.get("vllm_xargs")
    return set(content) | (set(extra) if isinstance(extra, dict) else set())


def _with_length(scope: Scope, length: int) -> list[tuple[bytes, bytes]]:
    return [
        (name, str(length).encode() if name.lower() == b"content-length" else value) for name, value in scope["headers"]
    ]


class _AnswerEditor:
    """Adds what was told to the usage of a JSON answer, or to the lines of an event stream that carry usage.

    Nothing is held back or looked at before an engine request has finished: usage is only told after that.
    """

    def __init__(self, request: RequestScope, send: Send) -> None:
        self.request, self.send = request, send
        self.start: Message | None = None
        self.kind = ""
        self.rest = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.kind = Headers(raw=message.get("headers", [])).get("content-type", "").partition(";")[0]
            if self.kind == "application/json" and self.request.usage:
                self.start = message  # its length isn't known yet
                return
        elif message["type"] == "http.response.body":
            body, last = message.get("body", b""), not message.get("more_body", False)
            if self.start is not None:
                self.rest += body
                return await self._answer(self.start) if last else None
            if self.kind == "text/event-stream" and self.request.usage:
                message = {**message, "body": self._lines(body, last)}
        await self.send(message)

    async def _answer(self, start: Message) -> None:
        body = self._edited(self.rest)
        headers = MutableHeaders(raw=list(start.get("headers", [])))
        headers["content-length"] = str(len(body))
        await self.send({**start, "headers": headers.raw})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    def _lines(self, data: bytes, last: bool) -> bytes:
        """Whole lines, edited; a part of one waits for the rest."""
        if not self.rest and b'"usage"' not in data and data.endswith(b"\n"):
            return data
        *lines, self.rest = (self.rest + data).split(b"\n")
        if last:
            lines, self.rest = [*lines, self.rest], b""
            return b"\n".join(self._line(line) for line in lines)
        return b"".join(self._line(line) + b"\n" for line in lines)

    def _line(self, line: bytes) -> bytes:
        if not line.startswith(b"data:"):
            return line
        value = line[5:].strip()
        edited = self._edited(value)
        return line if edited is value else line.replace(value, edited, 1)

    def _edited(self, data: bytes) -> bytes:
        """A JSON object with our fields in its usage: at the top, in a Responses `response` or a Cohere `delta`."""
        if b'"usage"' not in data:
            return data
        try:
            content = json.loads(data)
            for holder in (content, content.get("response"), content.get("delta")):
                if isinstance(holder, dict) and isinstance(holder.get("usage"), dict):
                    holder["usage"].update(self.request.merged())
                    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        except (ValueError, AttributeError, RecursionError):
            pass  # not a JSON object
        return data
