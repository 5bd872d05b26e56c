"""CriticalKV."""

from __future__ import annotations

import torch
from pydantic import Field

from kvcache.evidence import LayerEvidence
from kvcache.policies.snapkv import SnapKV
from kvcache.selection import among_top, force


class CriticalKV(SnapKV):
    """SnapKV's votes, and for half of the budget the votes times the size of what a token would add.

    A first part of the budget (`first_stage`) goes to the highest votes; the rest to the highest `(vote + epsilon) *
    |value|`. The paper projects values by the layer's output matrix first; measurements quoted by its implementers
    put that at 0.5 to 1 point and `epsilon` at 1.5 to 2, and the plain L1 norm is what this policy uses.

    Formula:
        vote_j as snapkv's score
        the `first_stage * budget` highest votes of a head:  score_j = 1 + vote_j / max(vote)
        all others:  score_j = (vote_j + epsilon) |v_j|_1 / max((vote + epsilon) |v|_1);  maxima are the layer's
    """

    name = "criticalkv"
    title = "CriticalKV: votes weighted by values"
    paper = "arXiv 2502.03805"

    class Args(SnapKV.Args):
        first_stage: float = Field(0.5, ge=0, le=1, description="Share of the budget that goes by votes alone.")
        epsilon: float = Field(1e-4, ge=0, le=1, description="Added to votes before they are weighted.")

    args: Args

    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        votes = super().scores(evidence)
        finite = votes.masked_fill(~votes.isfinite(), 0)
        sure = min(int(self.args.budget.resolve(evidence.shape[1]) * self.args.first_stage), evidence.shape[1])
        best = among_top(force(votes, 0, 0), sure)
        weights = torch.linalg.vector_norm(evidence.values, ord=1, dim=-1, dtype=torch.float32)
        # Weighted scores up to 1, sure tokens from 1 on in the order of their votes; one scale for all heads, so that
        # allocators may compare them.
        scores = torch.where(best, 1 + _to_one(finite), _to_one((finite + self.args.epsilon) * weights))
        unknown = votes + weights * 0  # NaN where either is, infinite where votes are forced
        return torch.where(unknown.isfinite(), scores, unknown)


def _to_one(scores: torch.Tensor) -> torch.Tensor:
    """Divided by the largest; NaNs stay."""
    return scores / scores.nan_to_num(0).amax().clamp(min=torch.finfo(torch.float32).tiny)
