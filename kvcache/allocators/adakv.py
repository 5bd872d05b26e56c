"""AdaKV's budgets."""

from __future__ import annotations

import torch
from pydantic import Field

from kvcache.allocators.base import HeadAllocator
from kvcache.method import Arguments


class AdaHeads(HeadAllocator):
    """The heads of a layer compete for its tokens, so that heads with flat attention get more.

    Each head is sure of `floor` of the mean; the rest goes to the highest scores of all heads together (the rule of
    kvpress, which keeps exactly the layer's total; the paper's code loses tokens to rounding). Scores of different
    heads are compared as they are, so it suits scores that are attention.

    Formula:
        each head is sure of floor * tokens(l); a layer's other tokens go to the highest scores left in all its heads
        tokens(head) = floor * tokens(l) + how many of those are the head's
    """

    name = "adakv"
    title = "AdaKV: heads compete"
    paper = "arXiv 2407.11550"

    class Args(Arguments):
        floor: float = Field(0.2, ge=0, le=1, description="Share of the mean that every head is sure of.")

    def shares(self, scores: torch.Tensor, tokens: int) -> torch.Tensor:
        heads, n = scores.shape
        sure = min(int(tokens * self.args.floor + 1e-9), n)  # 0.29 * 100 is 28.999... in binary floating point
        free = scores.clone()
        if sure:
            free.scatter_(1, scores.topk(sure, -1).indices, float("-inf"))
        winners = free.flatten().topk(heads * (tokens - sure)).indices // n
        return sure + torch.zeros(heads, device=scores.device).index_add_(
            0, winners, torch.ones_like(winners, dtype=torch.float32)
        )
