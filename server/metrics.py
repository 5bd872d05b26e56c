"""Prometheus metrics of compression, by policy; they appear in vLLM's `/metrics`."""

from __future__ import annotations

from prometheus_client import REGISTRY, CollectorRegistry, Counter

NAMES = {
    "compactions": ("longreach_kv_compactions", "Prompts compacted."),
    "tokens_seen": ("longreach_kv_tokens_seen", "Prompt tokens of compacted requests, per layer and KV head."),
    "tokens_kept": ("longreach_kv_tokens_kept", "Prompt tokens kept by compaction, mean per layer and KV head."),
    "blocks_freed": ("longreach_kv_blocks_freed", "Blocks of the KV cache that compaction gave back."),
    "nan_scores": ("longreach_kv_nan_scores", "Scores that were not a number; their tokens were kept."),
    "seconds": ("longreach_kv_compaction_seconds", "Time spent compacting."),
}


class CompressionMetrics:
    """Counters fed from the engine's running totals, so nothing is lost when a request ends without an answer."""

    def __init__(self, model_name: str, registry: CollectorRegistry = REGISTRY) -> None:
        self.model_name = model_name
        self.counters = {
            name: Counter(metric, help_text, ["model_name", "policy"], registry=registry)
            for name, (metric, help_text) in NAMES.items()
        }
        self._seen: dict[tuple[str, str], float] = {}

    def update(self, totals: dict[str, dict[str, float]]) -> None:
        """Raise the counters to the engine's totals (`kvcache.usage.CompressionTotals.by_policy`).

        Requests deliver them in any order, so lower totals than those seen are old news.
        """
        for policy, values in totals.items():
            for name, counter in self.counters.items():
                grown = values[name] - self._seen.get((policy, name), 0)
                if grown > 0:
                    counter.labels(self.model_name, policy).inc(grown)
                    self._seen[policy, name] = values[name]
