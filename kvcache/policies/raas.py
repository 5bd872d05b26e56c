"""RaaS."""

from __future__ import annotations

import torch
from pydantic import Field

from kvcache.evidence import Evidence, LayerEvidence
from kvcache.plan import RetentionPlan, whole_pages
from kvcache.policies.base import Policy, PolicyArgs
from kvcache.usage_tracking import last_use, ranked, unknown


class RaaS(Policy):
    """The prompt stays; of the answer, pages that no query has looked at for the longest time go first.

    A page of `page` tokens is looked at when a query gives it more than `alpha` of its attention. `budget` is the
    answer's, beside the whole prompt. The paper estimates a page's attention from representative keys at every step and
    evicts at every step; here it is the exact attention of the last `window` queries of each interval (with `window` as
    large as `interval`, of every query), by KV head. The scope of decisions is not verified (no code was read).

    Formula:
        p_i,j = mean over query heads of softmax_j(q_i . k_j), i among the last `window` queries of each interval
        page P = tokens j with j // page = P; query i looks at P if the sum of p_i,j over P > alpha
        t_P = max(newest token of P, the last i that looked at P)
        score_j = rank of t_P of its page, of equal ones the older token first; the prompt's tokens stay
    """

    name = "raas"
    title = "RaaS: pages of the answer by when they were last looked at"
    paper = "arXiv 2502.11147"
    heads_alone = True
    evidence = Evidence.WINDOW_QUERIES

    class Args(PolicyArgs):
        interval: int = Field(
            128, ge=1, description="Compact the answer every so many tokens, in whole pages of the cache."
        )
        window: int = Field(8, ge=1, le=256, description="Last queries of each interval that count.")
        page: int = Field(16, ge=1, le=256, description="Tokens of a page.")
        alpha: float = Field(1e-4, ge=0, lt=1, description="Attention above which a page has been looked at.")

    args: Args

    @property
    def recent(self) -> int:
        return self.args.window

    @property
    def question(self) -> int:
        """None beside the prompt, which stays whole."""
        return 0

    def plan(self, prompt_len: int, page_size: int) -> RetentionPlan | None:
        """The prompt and the budget in whole pages; the first compaction comes when an interval more is there."""
        budget = max(self.args.budget.resolve(prompt_len), self.minimum_budget(page_size))
        kept, interval = whole_pages(prompt_len, page_size), whole_pages(self.args.interval, page_size)
        kept += budget // page_size * page_size
        return RetentionPlan(kept + interval, page_size, kept // page_size, pinned=prompt_len, interval=interval)

    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        return ranked(self.carry(evidence))

    def carry(self, evidence: LayerEvidence) -> torch.Tensor:
        """When each token's page was last looked at, positions."""
        attention = evidence.watched_attention
        pages = _numbered(evidence.positions // self.args.page)
        of_queries = pages[:, None].expand(attention.shape)
        mass = torch.zeros_like(attention).scatter_add_(-1, of_queries, attention)
        stamps = last_use((mass > self.args.alpha).gather(-1, of_queries), evidence)
        newest = torch.full_like(stamps, float("-inf")).scatter_reduce_(-1, pages, stamps, "amax")
        return unknown(newest.gather(-1, pages), attention)


def _numbered(pages: torch.Tensor) -> torch.Tensor:
    """Page numbers, ascending in each row, without gaps from 0 on: int64 [num_kv_heads, n] in and out."""
    changes = (pages.diff(dim=-1) != 0).cumsum(-1)
    return torch.nn.functional.pad(changes, (1, 0))
