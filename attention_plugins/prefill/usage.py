"""What a request and a server can tell about sparse prefill."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from attention_plugins.prefill.base import Pattern
from attention_plugins.prefill.orders import PatternReport
from attention_plugins.prefill.registry import pattern_words

TOTALS = ("prompts", "tokens", "pairs", "pairs_computed")


@dataclass
class PrefillTotals:
    """Sums since the engine's start, by pattern and by the names in `TOTALS`. They only grow, so a reader that misses
    one message catches up with the next. Pairs are those of all layers."""

    by_pattern: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, report: PatternReport) -> None:
        totals = self.by_pattern.setdefault(report.pattern, dict.fromkeys(TOTALS, 0))
        totals["prompts"] += 1
        totals["tokens"] += report.tokens
        totals["pairs"] += report.pairs * len(report.density)
        totals["pairs_computed"] += report.pairs * sum(report.density)


def prefill_usage(pattern: Pattern, report: PatternReport | None) -> dict[str, Any]:
    """The field `usage.prefill_attention` of an answer.

    `density` is the share of the prompt's attention that was computed, by layer and their mean; 1 where the prompt was
    too short for the pattern (or hasn't been attended to its end). `tokens` were attended; the others came from the
    prefix cache.
    """
    told = pattern_words(pattern)
    if report is None:
        return {**told, "density": {"mean": 1.0}}
    layers = [round(density, 6) for density in report.density]
    return {**told, "tokens": report.tokens, "density": {"mean": sum(layers) / len(layers), "by_layer": layers}}
