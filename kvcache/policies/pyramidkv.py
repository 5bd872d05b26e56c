"""PyramidKV."""

from __future__ import annotations

from kvcache.allocators.pyramid import PyramidLayers
from kvcache.policies.snapkv import SnapKV


class PyramidKV(SnapKV):
    """SnapKV's votes, but lower layers keep more tokens than upper ones.

    The highest layer keeps 1/`beta` of the budget beside its window, the lowest as much more, in between linear.
    Renormalised: the sum over layers is exactly `layers * budget` (the published integer rule overspends, by 29 %
    at 80 layers and 128 tokens). Layers have different lengths; the page pool of a request holds them all.

    Formula:
        score_j as in snapkv
        scored tokens of layer l of L, S = budget - window:  first + l / (L - 1) * (last - first)
        last = S // beta, first = 2 S - last;  if first > prompt - window: first = prompt - window, last = 2 S - first
        prompts shorter than 2 S: S in every layer
    """

    name = "pyramidkv"
    title = "PyramidKV: SnapKV with budgets that shrink from layer to layer"
    paper = "arXiv 2406.02069"
    layers = PyramidLayers
