"""What a request and a server can tell about compression."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvcache.orders import CompactionReport
from kvcache.plan import RetentionPlan

TOTALS = ("compactions", "tokens_seen", "tokens_kept", "blocks_freed", "nan_scores", "seconds")

POOL = "longreach_pool"
"""Under which name a step's statistics hold `pool_blocks`."""


def pool_blocks(total: int, free: int, compacted: int) -> dict[str, int]:
    """Blocks of the KV cache by what holds them.

    Args:
        total: all that requests can have.
        free: those that no request holds, whether or not the prefix cache still finds something in them.
        compacted: those of compacted requests: what compaction kept, and what came since.

    Returns:
        By state: `compacted`, `dense` (all other requests', also prompts that wait for their compaction), `free`.
    """
    return {"compacted": compacted, "dense": total - free - compacted, "free": free}


@dataclass
class CompressionTotals:
    """Sums since the engine's start, by policy and by the names in `TOTALS`. They only grow, so a reader that
    misses one message catches up with the next."""

    by_policy: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, policy: str, report: CompactionReport) -> None:
        totals = self.by_policy.setdefault(policy, dict.fromkeys(TOTALS, 0))
        totals["compactions"] += 1
        totals["tokens_seen"] += report.tokens_seen
        totals["tokens_kept"] += report.tokens_kept
        totals["blocks_freed"] += report.blocks_freed
        totals["nan_scores"] += report.nan_scores
        totals["seconds"] += report.seconds


def kv_cache_usage(
    words: dict[str, Any],
    prompt_len: int,
    plan: RetentionPlan | None,
    report: CompactionReport | None,
    block_bytes: int,
    page_size: int,
) -> dict[str, Any]:
    """The field `usage.kv_cache` of an answer.

    `kept_tokens` are tokens per KV head by layer; `bytes_held` and `bytes_freed` are the prompt's KV cache after
    and by compaction, in whole blocks of `block_bytes`; the prompt's suffix counts as kept. A request that ended before
    its second token was never compacted, and a budget at or above the prompt drops nothing: both keep all. Where the
    answer was compacted too, `compacted_tokens` (prompt and answer up to there) takes the prompt's place.

    Args:
        report: of the last compaction. With its positions, `kept_positions` says which tokens stay, by layer.
    """
    seen = max(prompt_len, report.boundary) if report else prompt_len
    blocks = -(-seen // page_size)
    freed = report.boundary // page_size - plan.kept_pages if plan and report else 0
    layers = [tokens + seen - report.boundary for tokens in report.layer_tokens] if report else [float(prompt_len)]
    where = {}
    if report and report.positions:
        where["kept_positions"] = report.positions.usage(report.boundary // page_size * page_size, seen)
    # Whole tables, such as head gates, would be most of the answer; whoever gave them has them.
    told = {name: value for name, value in words.items() if not isinstance(value, list)}
    return {
        **told,
        "prompt_tokens": prompt_len,
        **({"compacted_tokens": seen} if seen > prompt_len else {}),
        "kept_tokens": {"mean": sum(layers) / len(layers), "min": min(layers), "max": max(layers)},
        "bytes_held": (blocks - freed) * block_bytes,
        "bytes_freed": freed * block_bytes,
        **where,
    }
