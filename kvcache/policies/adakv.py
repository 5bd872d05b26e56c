"""AdaKV."""

from __future__ import annotations

from pydantic import Field

from kvcache.allocators.adakv import AdaHeads
from kvcache.policies.snapkv import SnapKV
from kvcache.scorers import WindowReduce


class AdaKV(SnapKV):
    """SnapKV's votes; the KV heads of a layer compete for its tokens.

    Heads that look everywhere get more than heads that look at a few places. Each head has its own length here, and the
    memory is really freed (other implementations mask dropped tokens instead). Unlike SnapKV's here, votes are the mean
    over the window: where heads compete, what one query sees in one head would cost others what many of theirs see.

    Formula:
        score_j as in snapkv
        each head is sure of floor * tokens(l); a layer's other tokens go to the highest scores left in all its heads
        tokens(head) = floor * tokens(l) + how many of those are the head's
    """

    name = "adakv"
    title = "AdaKV: SnapKV with budgets by head"
    paper = "arXiv 2407.11550"
    heads = AdaHeads

    class Args(SnapKV.Args):
        window_reduce: WindowReduce = Field("mean", description="How the window's queries are reduced, before pooling.")
