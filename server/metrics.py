"""Prometheus metrics of compression, sparse attention and refusals; they appear in vLLM's `/metrics`."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from kvcache.usage import pool_blocks

NAMES = {
    "compactions": ("longreach_kv_compactions", "Prompts compacted."),
    "tokens_seen": ("longreach_kv_tokens_seen", "Prompt tokens of compacted requests, per layer and KV head."),
    "tokens_kept": ("longreach_kv_tokens_kept", "Prompt tokens kept by compaction, mean per layer and KV head."),
    "blocks_freed": ("longreach_kv_blocks_freed", "Blocks of the KV cache that compaction gave back."),
    "nan_scores": ("longreach_kv_nan_scores", "Scores that were not a number; their tokens were kept."),
    "seconds": ("longreach_kv_compaction_seconds", "Time spent compacting."),
}
STEPS = "Steps of decoding of requests with a selector, by what they read; crowded: all, for want of room."


PREFILL_NAMES = {
    "prompts": ("longreach_prefill_prompts", "Prompts attended by a pattern."),
    "tokens": ("longreach_prefill_tokens", "Their tokens, without those that the prefix cache gave."),
    "pairs": ("longreach_prefill_pairs", "(Block of 128 queries, page of keys) pairs of their attention, all layers."),
    "pairs_computed": ("longreach_prefill_pairs_computed", "Those of them that were computed, mean over heads."),
}


class _Follower:
    """A counter that follows running totals.

    Requests deliver these in any order, so lower totals than those seen are old news.
    """

    def __init__(self, counter: Counter) -> None:
        self.counter = counter
        self._seen: dict[tuple[str, ...], float] = {}

    def follow(self, total: float, *labels: str) -> None:
        grown = total - self._seen.get(labels, 0)
        if grown > 0:
            self.counter.labels(*labels).inc(grown)
            self._seen[labels] = total


class CompressionMetrics:
    """Counters fed from the engine's running totals, so nothing is lost when a request ends without an answer."""

    def __init__(self, model_name: str, registry: CollectorRegistry = REGISTRY) -> None:
        self.model_name = model_name
        self.counters = {
            name: _Follower(Counter(metric, help_text, ["model_name", "policy"], registry=registry))
            for name, (metric, help_text) in NAMES.items()
        }

    def update(self, totals: dict[str, dict[str, float]]) -> None:
        """Raise the counters to the engine's totals (`kvcache.usage.CompressionTotals.by_policy`)."""
        for policy, values in totals.items():
            for name, counter in self.counters.items():
                counter.follow(values[name], self.model_name, policy)


class AuditMetrics:
    """How often the engine has checked itself (`--kv-audit`): fed like `CompressionMetrics`."""

    def __init__(self, model_name: str, registry: CollectorRegistry = REGISTRY) -> None:
        self.model_name = model_name
        text = "Times that all blocks and page tables were found accounted for (--kv-audit)."
        self.checks = _Follower(Counter("longreach_kv_audits", text, ["model_name"], registry=registry))

    def update(self, checks: int) -> None:
        """Raise the counter to the engine's total."""
        self.checks.follow(checks, self.model_name)


class DecodeMetrics:
    """How many steps of decoding read what, by selector: fed like `CompressionMetrics`."""

    def __init__(self, model_name: str, registry: CollectorRegistry = REGISTRY) -> None:
        self.model_name = model_name
        labels = ["model_name", "selector", "mode"]
        self.steps = _Follower(Counter("longreach_decode_steps", STEPS, labels, registry=registry))

    def update(self, totals: dict[str, dict[str, int]]) -> None:
        """Raise the counter to the engine's totals: steps by selector and mode."""
        for selector, modes in totals.items():
            for mode, steps in modes.items():
                self.steps.follow(steps, self.model_name, selector, mode)


class PrefillMetrics:
    """What patterns have computed of prompts: fed like `CompressionMetrics`. Computed pairs by pairs is the density."""

    def __init__(self, model_name: str, registry: CollectorRegistry = REGISTRY) -> None:
        self.model_name = model_name
        self.counters = {
            name: _Follower(Counter(metric, help_text, ["model_name", "pattern"], registry=registry))
            for name, (metric, help_text) in PREFILL_NAMES.items()
        }

    def update(self, totals: dict[str, dict[str, float]]) -> None:
        """Raise the counters to the engine's totals (`attention_plugins.prefill.usage.PrefillTotals.by_pattern`)."""
        for pattern, values in totals.items():
            for name, counter in self.counters.items():
                counter.follow(values[name], self.model_name, pattern)


class PoolMetrics:
    """What holds the blocks of the KV cache, as of the engine's last step."""

    def __init__(self, model_name: str, blocks: int, registry: CollectorRegistry = REGISTRY) -> None:
        """Args:
        blocks: all that requests can have; free, until the first step tells.
        """
        self.model_name = model_name
        help_text = (
            "Blocks of the KV cache by what holds them: compacted requests, other requests (dense), none (free)."
        )
        self.gauge = Gauge("longreach_kv_blocks", help_text, ["model_name", "state"], registry=registry)
        self.update(pool_blocks(blocks, free=blocks, compacted=0))

    def update(self, blocks: dict[str, int]) -> None:
        """Set the gauge to what `kvcache.usage.pool_blocks` returns."""
        for state, number in blocks.items():
            self.gauge.labels(self.model_name, state).set(number)


class ErrorMetrics:
    """Requests that were answered with an error, by HTTP status and by the field of ours that was wrong."""

    def __init__(self, fields: Sequence[str], registry: CollectorRegistry = REGISTRY) -> None:
        """Args:
        fields: the request fields that get a value of the label `field`; other errors have an empty one.
        """
        self.fields = fields
        help_text = "Requests answered with an error; field: which field of ours was wrong."
        self.counter = Counter("longreach_request_errors", help_text, ["code", "field"], registry=registry)
        for field in ("", *fields):  # there from the start, so that rates see the first one
            self.counter.labels("400", field)
        self.counter.labels("500", "")

    def count(self, code: int, param: str | None = None) -> None:
        """Count one.

        Args:
            param: the field that the answer names, as in OpenAI's `error.param`.
        """
        field = (param or "").partition(".")[0]
        self.counter.labels(str(code), field if field in self.fields else "").inc()
