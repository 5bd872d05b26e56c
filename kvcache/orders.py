"""What a worker is told to do with a request, and what it tells of a compaction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from kvcache.kept_positions import KeptPositions
from kvcache.plan import RetentionPlan
from kvcache.stopwatch import Stopwatch
from kvcache.tables import to_host


@dataclass(frozen=True)
class Start:
    """A request with a policy starts (or starts again after preemption)."""

    request_id: str
    policy: dict[str, Any]
    plan: RetentionPlan


@dataclass(frozen=True)
class Compact:
    """A request has reached a boundary of its plan: compact what it holds.

    At the first, `source_blocks` are all blocks of the prompt, the partly filled last one too (its keys are evidence),
    and `target_blocks` are where the kept tokens go. Later, the sources are the full blocks appended since, and what is
    kept stays in the same target blocks. With `bin_tokens`, the report tells which positions are kept, by bins of so
    many tokens.
    """

    request_id: str
    source_blocks: list[int]
    target_blocks: list[int]
    boundary: int
    bin_tokens: int = 0


@dataclass(frozen=True)
class CompactionReport:
    """What a compaction did.

    Attributes:
        boundary: computed tokens of the request.
        layer_tokens: tokens that each layer has kept per KV head, the tail included.
        tokens_seen: tokens per KV head before it, mean over layers.
        blocks_freed: blocks that the request holds less.
        nan_scores: scores that could not be computed.
        seconds: of the device's time.
        positions: which were kept, the tail left out; where the order asks for it.
    """

    request_id: str
    boundary: int
    layer_tokens: list[float]
    tokens_seen: float
    blocks_freed: int
    nan_scores: int
    seconds: float
    positions: KeptPositions | None = None

    @property
    def tokens_kept(self) -> float:
        """Mean over layers."""
        return sum(self.layer_tokens) / len(self.layer_tokens)


class PendingReport:
    """A compaction whose work may still be running on a GPU."""

    def __init__(self, report: CompactionReport, nan_scores: torch.Tensor, watch: Stopwatch) -> None:
        self._report, self._watch = report, watch
        # Copied now, in order with the work itself: reading it later would wait for all that is queued by then.
        self._nan_scores = to_host(nan_scores)
        watch.stop()

    def finish(self) -> CompactionReport:
        """Wait for the work and tell what it did."""
        seconds = self._watch.seconds()
        return replace(self._report, nan_scores=int(self._nan_scores), seconds=seconds)
