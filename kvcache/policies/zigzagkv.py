"""ZigZagKV."""

from __future__ import annotations

from kvcache.allocators.zigzag import ZigZagLayers
from kvcache.policies.snapkv import SnapKV


class ZigZagKV(SnapKV):
    """SnapKV's votes; layers whose attention is spread over many tokens keep more of them.

    How many tokens hold 90 % of a layer's attention is measured on the prompt itself, so budgets differ from request to
    request and are known when the last layer has been scored. Re-implemented from the paper's description: no code was
    released, and the share that every layer gets alike (`bound`) is not verified.

    Formula:
        score_j as in snapkv; p_h,j = mean over the last `window` queries q of query head h of softmax_j(q . k_j)
        LMBA(l) = mean over query heads h of the fewest j whose p_h,j sum to `mass` of all
        tokens(l) = bound * budget + (1 - bound) * budget * layers * LMBA(l) / sum of LMBA
    """

    name = "zigzagkv"
    title = "ZigZagKV: SnapKV with budgets by each layer's uncertainty"
    paper = "arXiv 2412.09036"
    layers = ZigZagLayers
