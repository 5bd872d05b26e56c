"""H2O."""

from __future__ import annotations

import torch
from pydantic import Field

from kvcache.evidence import Evidence, LayerEvidence
from kvcache.observers.base import Observer
from kvcache.observers.window import QueryWindow
from kvcache.policies.base import Policy, PolicyArgs


class H2O(Policy):
    """Heavy hitters stay: the tokens that got the most attention from the whole prompt, beside the last ones.

    A share of each KV head's tokens goes to the last of the prompt (half, as in the paper's 10 % + 10 %), the rest to
    the largest sums of attention over all of the prompt's queries. The sums favour old tokens, which more queries have
    seen. Reduced to KV heads by the mean over their query heads; the paper's code keeps a cache for every query head.
    The paper forces no sinks (`sinks: 0`).

    Sums take a second pass over all queries and keys, which grows with the square of the prompt, and no prompt starts
    from the prefix cache. With an `interval`, the sums go on over the answer: the last `watch` queries of each interval
    add to them (the paper: every query, and a token is evicted at every step). A prompt within the budget is watched,
    and every token of its answer, until the first compaction.

    Formula:
        score_j = sum over all queries q_i of the prompt, i >= j, of the mean over query heads of softmax_j(q_i . k_j)
        after each interval: score_j += the same sum over the interval's last `watch` queries
        last tokens that stay = recent_share * tokens kept
    """

    name = "h2o"
    title = "H2O: heavy hitters"
    paper = "arXiv 2306.14048"
    heads_alone = True
    evidence = Evidence.COLUMN_SUMS
    query_aware = True
    watches_answers = True

    class Args(PolicyArgs):
        recent_share: float = Field(0.5, ge=0, le=1, description="Share of the budget that the last tokens get.")
        watch: int = Field(8, ge=1, le=256, description="Last queries of each interval that add to the sums.")

    args: Args

    def recent_of(self, tokens: torch.Tensor) -> torch.Tensor:
        # 1e-9: 0.29 * 100 is 28.999... in binary floating point.
        recent = (tokens.double() * self.args.recent_share + 1e-9).long()
        return recent.minimum((tokens - self.args.sinks).clamp(min=0))

    def answer_observers(self, num_layers: int, begin: int, end: int) -> tuple[Observer, ...]:
        return (QueryWindow(num_layers, min(self.args.watch, end - begin), end),)

    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        return self.carry(evidence)

    def carry(self, evidence: LayerEvidence) -> torch.Tensor:
        """The sums."""
        if evidence.history is None:
            return evidence.column_sums
        return evidence.history.nan_to_num(0) + evidence.watched_attention.sum(1)
