"""What one HTTP request and the engine calls made for it share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from attention_plugins.decode.registry import FIELD as DECODE_FIELD
from attention_plugins.prefill.registry import FIELD as PREFILL_FIELD

KV_FIELD = "kv_cache"
FIELDS = (KV_FIELD, DECODE_FIELD, PREFILL_FIELD)


@dataclass
class RequestScope:
    """Set by the middleware before a handler runs, read and filled by the engine client under it.

    Attributes:
        words: by field, what the request asks for, checked. A field that isn't there is the server's default.
        usage: by field, what each engine request that has finished tells in the answer's usage.
    """

    words: dict[str, dict[str, Any]] = field(default_factory=dict)
    usage: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def tell(self, name: str, usage: dict[str, Any]) -> None:
        self.usage.setdefault(name, []).append(usage)

    def merged(self) -> dict[str, dict[str, Any]]:
        """By field, one usage for all engine requests."""
        return {name: _MERGE[name](parts) for name, parts in self.usage.items()}


current_scope: ContextVar[RequestScope | None] = ContextVar("longreach_request_scope", default=None)


def merge_kv(usages: list[dict[str, Any]]) -> dict[str, Any]:
    """One field for an answer to several prompts: tokens and bytes add up, kept tokens are averaged by prompt."""
    if len(usages) == 1:
        return usages[0]
    kept = [usage["kept_tokens"] for usage in usages]
    merged = {name: value for name, value in usages[0].items() if name != "kept_positions"}  # one prompt's
    for name in {"prompt_tokens", "bytes_held", "bytes_freed"} & set(merged):
        merged[name] = sum(usage[name] for usage in usages)
    merged["kept_tokens"] = {
        "mean": sum(part["mean"] for part in kept) / len(kept),
        "min": min(part["min"] for part in kept),
        "max": max(part["max"] for part in kept),
    }
    return merged


def merge_decode(usages: list[dict[str, Any]]) -> dict[str, Any]:
    """One field for an answer to several prompts: steps add up."""
    steps: Counter[str] = Counter()
    for usage in usages:
        steps.update(usage.get("steps", {}))
    return {**usages[0], "steps": dict(steps)} if "steps" in usages[0] else usages[0]


def merge_prefill(usages: list[dict[str, Any]]) -> dict[str, Any]:
    """One field for an answer to several prompts: tokens add up, densities are averaged by prompt."""
    if len(usages) == 1 or "density" not in usages[0]:  # dense
        return usages[0]
    densities = [usage["density"] for usage in usages]
    merged: dict[str, Any] = {"mean": sum(density["mean"] for density in densities) / len(densities)}
    layers = [density["by_layer"] for density in densities if "by_layer" in density]
    if len(layers) == len(densities):
        merged["by_layer"] = [sum(parts) / len(parts) for parts in zip(*layers, strict=True)]
    tokens = {"tokens": sum(usage.get("tokens", 0) for usage in usages)} if layers else {}
    return {**usages[0], **tokens, "density": merged}


_MERGE: dict[str, Callable[[list[dict[str, Any]]], dict[str, Any]]] = {
    KV_FIELD: merge_kv,
    DECODE_FIELD: merge_decode,
    PREFILL_FIELD: merge_prefill,
}
