"""Raw ASGI: send a request to an app message by message, and see every message that it sends back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from types import SimpleNamespace
from typing import Any

from server.bodies import BodyMiddleware
from server.desks import Desks
from server.limits import Limits
from server.middleware import FieldsMiddleware
from server.patterns import PatternDesk
from server.policies import PolicyDesk
from server.scope import current_scope
from server.selectors import SelectorDesk

Message = dict[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]
PAGE = 16
LIMITS = Limits(body_bytes=64 << 20)
USAGE = {"policy": "none", "prompt_tokens": 7, "kept_tokens": {"mean": 7.0, "min": 7.0, "max": 7.0}, "bytes_held": 2,
         "bytes_freed": 1}  # fmt: skip


def body_messages(*parts: bytes) -> list[Message]:
    return [{"type": "http.request", "body": part, "more_body": part is not parts[-1]} for part in parts]


def http_scope(method: str = "POST", content_type: str | None = "application/json", **headers: str) -> Message:
    fields = {"content-type": content_type, **headers}
    return {
        "type": "http",
        "method": method,
        "path": "/v1/completions",
        "headers": [(name.replace("_", "-").encode(), text.encode()) for name, text in fields.items() if text],
    }


class Handler:
    """An innermost app: reads the body, notes what it saw, finishes engine requests, and answers as told."""

    def __init__(self, answer: list[Message] | None = None, finished: tuple[dict[str, Any], ...] = ()) -> None:
        self.answer = [] if answer is None else answer
        self.finished = finished
        self.scope: Any = None
        self.seen: list[Message] = []
        self.words: Any = "not called"
        self.decode: Any = "not called"

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.seen if message["type"] == "http.request")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope = scope
        request = current_scope.get()
        self.words = request.words.get("kv_cache") if request else "no scope"
        self.decode = request.words.get("decode_attention") if request else "no scope"
        if scope["type"] == "http":
            while not self.seen or self.seen[-1].get("more_body"):
                self.seen.append(await receive())
        if request:
            for usage in self.finished:
                request.tell("decode_attention" if "selector" in usage else "kv_cache", usage)
        for message in self.answer:
            await send(message)


def desks(policies: PolicyDesk | None = None, **selectors: Any) -> Desks:
    """A server's; by default one that compresses nothing and has a few selectors."""
    settings = {"enabled": ["recycled", "tidal", "quest"], **selectors}
    return Desks(policies or PolicyDesk({"policy": "none"}, PAGE), SelectorDesk(**settings), PatternDesk())


def exchange(
    handler: App,
    scope: Message,
    messages: list[Message],
    desk: PolicyDesk | Desks | None = None,
    sent: list[Message] | None = None,
    limits: Limits = LIMITS,
) -> tuple[list[Message], list[Message]]:
    """Return what the client was sent (in `sent` also when the app fails), and its messages that nobody read."""
    own = desk if isinstance(desk, Desks) else desks(desk)
    state = SimpleNamespace(longreach_desks=own, longreach_limits=limits)
    left, sent = list(messages), [] if sent is None else sent

    async def receive() -> Message:
        return left.pop(0)

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(dict(message))

    async def run() -> None:
        await BodyMiddleware(FieldsMiddleware(handler))({**scope, "app": SimpleNamespace(state=state)}, receive, send)
        assert current_scope.get() is None

    asyncio.run(run())
    return sent, left


def post(handler: App, content: Any, desk: PolicyDesk | Desks | None = None) -> list[Message]:
    """Post JSON as most clients do: one message, with its length."""
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return exchange(handler, http_scope(content_length=str(len(body))), body_messages(body), desk)[0]


def answer(body: bytes, kind: str = "application/json", status: int = 200, **headers: str) -> list[Message]:
    fields = {"content-type": kind, **headers}
    return [
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.replace("_", "-").encode(), text.encode()) for name, text in fields.items()],
        },
        {"type": "http.response.body", "body": body, "more_body": False},
    ]


def stream(*chunks: bytes) -> list[Message]:
    start = answer(b"", "text/event-stream; charset=utf-8")[0]
    return [start, *({"type": "http.response.body", "body": chunk, "more_body": True} for chunk in chunks),
            {"type": "http.response.body", "body": b"", "more_body": False}]  # fmt: skip


def sent_body(sent: list[Message]) -> bytes:
    return b"".join(message["body"] for message in sent if message["type"] == "http.response.body")
