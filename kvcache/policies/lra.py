"""LRA."""

from __future__ import annotations

from abc import abstractmethod

import torch
from pydantic import Field

from kvcache.evidence import Evidence, LayerEvidence
from kvcache.policies.base import AnswerArgs, Policy
from kvcache.usage_tracking import last_use, ranked, top_k, unknown


class Attendre(Policy):
    """What LRA and LFA share: a query uses the tokens that it attends to most."""

    name = "attendre"
    title = "Attendre: eviction by use"
    paper = "arXiv 2401.04881"
    heads_alone = True
    evidence = Evidence.WINDOW_QUERIES
    query_aware = True

    class Args(AnswerArgs):
        window: int = Field(8, ge=1, le=256, description="Last queries, of prompt and of each interval, that count.")
        top: int = Field(32, ge=1, le=4096, description="Tokens that a query uses: those it attends to most.")

    args: Args

    @property
    def recent(self) -> int:
        return self.args.window

    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        return ranked(self.carry(evidence))

    def carry(self, evidence: LayerEvidence) -> torch.Tensor:
        """The statistic of each token's use; NaN where it can't be known."""
        attention = evidence.watched_attention
        return unknown(self.statistic(top_k(attention, self.args.top), evidence), attention)

    @abstractmethod
    def statistic(self, used: torch.Tensor, evidence: LayerEvidence) -> torch.Tensor:
        """float32 [num_kv_heads, n] of bool [num_kv_heads, window, n], which queries used which tokens."""


class LRA(Attendre):
    """The tokens that no query has used for the longest time go first.

    A query uses the `top` tokens that it attends to most, by KV head; a token that came and was not used yet counts as
    used when it came. The paper counts every query, and its memory is one of the model's own; here the last `window` of
    the prompt and of each interval count (with `window` as large as `interval`, every query of the answer does). Sizes
    are not verified against the paper.

    Formula:
        p_i,j = mean over query heads of softmax_j(q_i . k_j); query i uses the `top` tokens with the largest p_i,j
        t_j = max(j, the last i that used j), i among the last `window` queries of the prompt and of each interval
        score_j = rank of t_j, of equal ones the older token first
    """

    name = "lra"
    title = "LRA: least recently attended tokens go first"

    def statistic(self, used: torch.Tensor, evidence: LayerEvidence) -> torch.Tensor:
        """When each token was last used, positions."""
        return last_use(used, evidence)
