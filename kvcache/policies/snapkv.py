"""SnapKV."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field

from kvcache.evidence import Evidence, LayerEvidence
from kvcache.method import Odd
from kvcache.policies.base import Policy, PolicyArgs
from kvcache.scorers import GroupReduce, GroupStage, Pooling, WindowReduce, window_votes


class SnapKV(Policy):
    """The prompt's last `window` queries vote for the tokens that stay; pooling lets neighbours survive together.

    Best when the question stands at the end of the prompt. Scores are reduced to KV heads (the paper's code keeps
    a copy for every query head, G times the memory under GQA); of a group the head that votes strongest counts, which
    found more passkeys than the mean. So does, of the window, the query that votes strongest; the paper takes the mean
    of them (`window_reduce`). The window is inside the budget. Max pooling over 21 positions is wider than the paper's
    average over 5: on passkeys, whose digits are tokens of their own, narrow pooling kept parts of a key
    (docs/results.md).

    Formula:
        p_h,j = window_reduce over the last `window` queries q of query head h of softmax_j(q . k_j)
        score_j = group_reduce over h of pooling(p_h)_j, over `kernel` positions around j
        group_stage "logits": score_j = pooling(window_reduce over q of softmax_j(group_reduce over h of q_h . k_j))_j
    """

    name = "snapkv"
    title = "SnapKV: the last queries vote"
    paper = "arXiv 2404.14469"
    heads_alone = True
    evidence = Evidence.WINDOW_QUERIES
    query_aware = True

    class Args(PolicyArgs):
        window: int = Field(32, ge=1, le=1024, description="Last queries that vote; these tokens always stay.")
        kernel: Odd = Field(21, ge=1, le=127, description="Width of the pooling over positions; odd.")
        pooling: Pooling = Field("max", description="Pooling of the votes over positions.")
        window_reduce: WindowReduce = Field("max", description="How the window's queries are reduced, before pooling.")
        group_reduce: GroupReduce = Field("max", description="How the query heads of a KV head are reduced.")
        group_stage: GroupStage = Field("probabilities", description="Whether groups are reduced after the softmax.")

    args: Args

    @property
    def recent(self) -> int:
        return self.args.window

    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        votes = window_votes(
            evidence,
            pooling=self.args.pooling,
            kernel=self.args.kernel,
            group_reduce=self.args.group_reduce,
            group_stage=self.args.group_stage,
            window_reduce=self.args.window_reduce,
        )
        return F.pad(votes, (0, evidence.shape[1] - votes.shape[-1]), value=float("inf"))
