"""CriticalKV."""

from __future__ import annotations

import torch
from pydantic import Field

from kvcache.evidence import LayerEvidence
from kvcache.policies.snapkv import SnapKV


class CriticalKV(SnapKV):
    """SnapKV's votes, and for half of the budget the votes times the size of what a token would add.

    A first part of the budget (`first_stage`) goes to the highest votes; the rest to the highest `(vote + epsilon) *
    |value|`. The paper projects values by the layer's output matrix first; measurements quoted by its implementers
    put that at 0.5 to 1 point and `epsilon` at 1.5 to 2, and the plain L1 norm is what this policy uses.
    """

    name = "criticalkv"
    title = "CriticalKV: votes weighted by values"
    paper = "arXiv 2502.03805"

    class Args(SnapKV.Args):
        first_stage: float = Field(0.5, ge=0, le=1, description="Share of the budget that goes by votes alone.")
        epsilon: float = Field(1e-4, ge=0, description="Added to votes before they are weighted.")

    args: Args

    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        votes = super().scores(evidence)
        prompt_len = evidence.shape[1]
        sure = int(self.args.budget.resolve(prompt_len) * self.args.first_stage)
        weights = torch.linalg.vector_norm(evidence.values, ord=1, dim=-1, dtype=torch.float32)
        scores = (votes + self.args.epsilon) * weights
        best = votes.topk(min(max(sure, 0), prompt_len), -1).indices
        # Beyond every weighted score, in the order of the votes.
        top = scores.masked_fill(scores.isinf(), 0).amax(-1, keepdim=True)
        return scores.scatter(-1, best, top + 1 + votes.gather(-1, best))
