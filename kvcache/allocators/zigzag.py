"""ZigZagKV's budgets."""

from __future__ import annotations

import torch
from pydantic import Field

from kvcache.allocators.base import LayerAllocator
from kvcache.evidence import Evidence, LayerEvidence
from kvcache.method import Arguments


def tokens_for_mass(attention: torch.Tensor, mass: float) -> torch.Tensor:
    """LMBA (arXiv 2412.09036): how many of a row's largest entries sum to at least `mass` of the row.

    Args:
        attention: float [..., n], not negative.
        mass: 0 < mass <= 1.

    Returns:
        int64 [...], at least 1; n where the row has a NaN, since nothing is known of it.
    """
    falling = attention.sort(-1, descending=True).values.cumsum(-1)
    # 1e-6: .5 + .3 + .1 is not quite .9 in binary floating point.
    tokens = 1 + (falling < (mass - 1e-6) * falling[..., -1:]).sum(-1)
    return tokens.masked_fill(falling[..., -1].isnan(), attention.shape[-1])


class ZigZagLayers(LayerAllocator):
    """Each layer gets a share by how many tokens hold `mass` of its attention.

    The number (LMBA) is the mean over query heads of the observation window's attention, before pooling. `bound` of
    the budget goes to every layer alike, the rest by LMBA. A share beyond the prompt is spread over the other layers
    (not specified in the paper). The paper's `bound` is not verified; no code was released.

    Formula:
        p_h,j = mean over the last `window` queries q of query head h of softmax_j(q . k_j)
        LMBA(l) = mean over query heads h of the fewest j whose p_h,j sum to `mass` of all
        tokens(l) = bound * budget + (1 - bound) * budget * layers * LMBA(l) / sum of LMBA
    """

    name = "zigzag"
    title = "ZigZagKV: by the uncertainty of each layer's attention"
    paper = "arXiv 2412.09036"
    evidence = Evidence.WINDOW_QUERIES

    class Args(Arguments):
        window: int = Field(32, ge=1, le=1024, description="Last queries that vote.")
        mass: float = Field(0.9, gt=0, le=1, description="Attention that a layer's tokens should hold.")
        bound: float = Field(0.5, ge=0, le=1, description="Share of the budget that every layer gets.")

    def statistic(self, evidence: LayerEvidence) -> torch.Tensor:
        return tokens_for_mass(evidence.window_attention, self.args.mass).double().mean()

    def shares(
        self, num_layers: int, budget: int, prompt_len: int, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert statistics is not None
        bound = self.args.bound * budget
        return bound + (budget - bound) * num_layers * statistics / statistics.sum()
