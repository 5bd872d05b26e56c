"""Lets requests in that bring a key, as far as the key goes."""

from __future__ import annotations

import base64
import binascii
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.access.keys import Key, find_key
from server.access.meters import Meter, Meters
from server.access.metrics import UNKNOWN, KeyMetrics
from server.access.watch import KeyFile
from server.refusal import refuse

_AREAS = {
    "metrics": ("/metrics",),
    "console": ("/console",),
    "admin": ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    "api": ("/v1", "/v2", "/inference", "/cohere", "/invocations", "/tokenize", "/detokenize", "/tokenizer_info",
            "/generative_scoring", "/pooling", "/classify", "/score", "/rerank", "/version", "/load", "/docs", "/redoc",
            "/openapi.json"),
}  # fmt: skip
"""By area, in the order of looking, paths with all below them. What is in none is `admin`: nothing opens by mistake."""


@dataclass
class Access:
    """What one server lets in.

    Attributes:
        open_paths: need no key, with all below them.
    """

    file: KeyFile
    open_paths: tuple[str, ...]
    metrics: KeyMetrics
    meters: Meters


@dataclass(frozen=True)
class Visitor:
    """Who a request is from, for the engine client that serves it."""

    key: Key
    meter: Meter
    metrics: KeyMetrics

    def charge(self, kind: str, tokens: int) -> None:
        """Count tokens: `prompt` or `generated`."""
        self.meter.charge(tokens)
        self.metrics.tokens.labels(self.key.name, kind).inc(tokens)


current_visitor: ContextVar[Visitor | None] = ContextVar("longreach_visitor", default=None)


def area_of(path: str) -> str:
    """What a path belongs to, of `keys.AREAS`."""
    return next((area for area, prefixes in _AREAS.items() if _below(path, prefixes)), "admin")


def _below(path: str, prefixes: tuple[str, ...]) -> bool:
    return any(path == prefix or path.startswith(prefix + "/") for prefix in prefixes)


def presented_key(headers: Headers) -> str | None:
    """The key that a request brings: as a bearer token, as Anthropic's clients do, or as browsers send a password."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return None
    return headers.get("x-api-key")


class AccessMiddleware:
    """Answers 401 without a key, 403 with one that is for something else, 429 beyond its limits. Answers that are given
    pass untouched. Where the server has no file of keys, everything passes."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        access: Access | None = scope["app"].state.longreach_access if scope["type"] != "lifespan" else None
        if access is None:
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if _below(path, access.open_paths):
            return await self.app(scope, receive, send)
        area = area_of(path)
        key = find_key(access.file.keys, presented_key(Headers(scope=scope)) or "")
        if key is None or area not in key.areas:
            access.metrics.answered(key.name if key else UNKNOWN, "403" if key else "401")
            return await _turn_away(key, area)(scope, receive, send)
        if area != "api" or scope["type"] != "http":
            access.metrics.answered(key.name, "let in")
            return await self.app(scope, receive, send)
        meter = access.meters.of(key)
        if excess := meter.enter():
            access.metrics.answered(key.name, "429")
            message = f"The key {key.name} may have {excess.message}; try again in {excess.retry_after} s."
            return await refuse(429, message, retry_after=str(excess.retry_after))(scope, receive, send)
        access.metrics.answered(key.name, "let in")
        running = access.metrics.running.labels(key.name)
        running.inc()
        token = current_visitor.set(Visitor(key, meter, access.metrics))
        try:
            await self.app(scope, receive, send)
        finally:
            current_visitor.reset(token)
            running.dec()
            meter.leave()


def _turn_away(key: Key | None, area: str) -> Response:
    """To a WebSocket starlette's responses are a refusal too."""
    if key is not None:
        return refuse(403, f"The key {key.name} isn't for {area}; it has for={','.join(key.areas)}.")
    asks = 'Basic realm="longreach"' if area == "console" else "Bearer"
    return refuse(401, "This needs a key: send `Authorization: Bearer KEY`.", www_authenticate=asks)
