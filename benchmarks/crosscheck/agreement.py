"""How far two choices agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.crosscheck.ours import Ours


@dataclass
class Agreement:
    """Sums over documents, layers and KV heads (a set is the kept tokens of one of each).

    Attributes:
        sets, identical: kept sets, and those that are the same on both sides when ours is given kvpress' counts.
        tokens, shared: kept tokens, and those that both keep.
        gap: the largest distance of our scores between a token that only kvpress keeps and one that only we keep, as
            a share of the larger of the two: rounding when it is near 0.
        same_counts: sets for which both give the same number of tokens.
        budget_ours, budget_theirs: tokens over all layers and heads.
        largest_shift: largest difference of a set's number of tokens.
        lowest: smallest share of one set that both keep.
    """

    sets: int = 0
    identical: int = 0
    tokens: int = 0
    shared: int = 0
    gap: float = 0.0
    same_counts: int = 0
    budget_ours: int = 0
    budget_theirs: int = 0
    largest_shift: int = 0
    lowest: float = 1.0

    def add(self, ours: Ours, theirs: torch.Tensor) -> None:
        """Take in one document; theirs: bool [L, H_kv, n]."""
        counts, wanted = theirs.sum(-1), ours.counts()
        mine = ours.kept(counts)
        both = (mine & theirs).sum(-1)
        self.sets += counts.numel()
        self.identical += int((both == counts).sum())
        self.tokens += int(counts.sum())
        self.shared += int(both.sum())
        self.lowest = min(self.lowest, float((both / counts).min()))
        self.same_counts += int((counts == wanted).sum())
        self.budget_ours += int(wanted.sum())
        self.budget_theirs += int(counts.sum())
        self.largest_shift = max(self.largest_shift, int((counts - wanted).abs().max()))
        infinity = float("inf")
        best = ours.scores.masked_fill(~(mine & ~theirs), -infinity).amax(-1)
        worst = ours.scores.masked_fill(~(theirs & ~mine), infinity).amin(-1)
        differ = both < counts
        if differ.any():
            larger = torch.maximum(best.abs(), worst.abs())[differ].clamp(min=torch.finfo(torch.float32).tiny)
            self.gap = max(self.gap, float(((best - worst)[differ] / larger).max()))

    def summary(self) -> dict[str, Any]:
        """Shares and sums, as JSON-able data."""
        return {
            "sets": self.sets,
            "identical": round(self.identical / self.sets, 5),
            "overlap": round(self.shared / self.tokens, 6),
            "lowest_overlap": round(self.lowest, 4),
            "score_gap": float(f"{self.gap:.2g}"),
            "same_counts": round(self.same_counts / self.sets, 5),
            "largest_shift": self.largest_shift,
            "tokens_ours": self.budget_ours,
            "tokens_kvpress": self.budget_theirs,
        }
