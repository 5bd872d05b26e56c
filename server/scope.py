"""What one HTTP request and the engine calls made for it share."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RequestScope:
    """Set by the middleware before a handler runs, read and filled by the engine client under it.

    Attributes:
        kv_cache: the checked policy of the request, or None: the server's default.
        usage: `usage.kv_cache` of each engine request that has finished.
    """

    kv_cache: dict[str, Any] | None = None
    usage: list[dict[str, Any]] = field(default_factory=list)


current_scope: ContextVar[RequestScope | None] = ContextVar("longreach_request_scope", default=None)


def merge_usage(usages: list[dict[str, Any]]) -> dict[str, Any]:
    """One field for an answer to several prompts: tokens and bytes add up, kept tokens are averaged by prompt."""
    if len(usages) == 1:
        return usages[0]
    kept = [usage["kept_tokens"] for usage in usages]
    merged = dict(usages[0])
    for name in {"prompt_tokens", "bytes_held", "bytes_freed"} & set(merged):
        merged[name] = sum(usage[name] for usage in usages)
    merged["kept_tokens"] = {
        "mean": sum(part["mean"] for part in kept) / len(kept),
        "min": min(part["min"] for part in kept),
        "max": max(part["max"] for part in kept),
    }
    return merged
