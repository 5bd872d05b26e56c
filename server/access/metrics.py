"""Who used what, by the name of the key. The key itself is nowhere."""

from __future__ import annotations

from functools import cache

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

UNKNOWN = "(unknown)"
"""Requests without a key that is known; no key may have this name."""


class KeyMetrics:
    """Requests, tokens and what is under way, by key."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        text = "Requests by key: let in, or refused with 401 (no such key), 403 (not for this) or 429 (a limit)."
        self.requests = Counter("longreach_key_requests", text, ["key", "answer"], registry=registry)
        text = "Tokens of prompts, and generated ones, by key."
        self.tokens = Counter("longreach_key_tokens", text, ["key", "kind"], registry=registry)
        text = "Requests under way, by key."
        self.running = Gauge("longreach_key_requests_running", text, ["key"], registry=registry)

    def answered(self, key: str, answer: str) -> None:
        self.requests.labels(key, answer).inc()


@cache
def key_metrics() -> KeyMetrics:
    """The process's own: servers that follow each other in one process count on."""
    return KeyMetrics()
