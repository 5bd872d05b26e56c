"""LFA."""

from __future__ import annotations

import torch

from kvcache.evidence import LayerEvidence
from kvcache.policies.lra import Attendre


class LFA(Attendre):
    """The tokens that the fewest queries have used go first, of equal ones the older.

    A query uses the `top` tokens that it attends to most, by KV head. The paper counts every query, and its memory is
    one of the model's own; here the last `window` of the prompt and of each interval count (with `window` as large as
    `interval`, every query of the answer does). Sizes are not verified against the paper.

    Formula:
        p_i,j = mean over query heads of softmax_j(q_i . k_j); query i uses the `top` tokens with the largest p_i,j
        c_j = how many i used j, i among the last `window` queries of the prompt and of each interval
        score_j = rank of c_j, of equal ones the older token first
    """

    name = "lfa"
    title = "LFA: least frequently attended tokens go first"

    def statistic(self, used: torch.Tensor, evidence: LayerEvidence) -> torch.Tensor:
        """How often each token was used."""
        uses = used.sum(1).float()
        return uses if evidence.history is None else uses + evidence.history.nan_to_num(0)
