"""PyramidKV."""

from __future__ import annotations

import torch
from pydantic import Field

from kvcache.allocation import pyramid_shares
from kvcache.policies.snapkv import SnapKV


class PyramidKV(SnapKV):
    """SnapKV's votes, but lower layers keep more tokens than upper ones.

    The highest layer keeps 1/`beta` of the budget beside its window, the lowest as much more, in between linear.
    Renormalised: the sum over layers is exactly `layers * budget` (the published integer rule overspends, by 29 %
    at 80 layers and 128 tokens). Layers have different lengths; the page pool of a request holds them all.
    """

    name = "pyramidkv"
    title = "PyramidKV: SnapKV with budgets that shrink from layer to layer"
    paper = "arXiv 2406.02069"
    layer_lengths_differ = True

    class Args(SnapKV.Args):
        beta: int = Field(20, ge=1, le=1000, description="Steepness: the highest layer keeps budget / beta.")

    args: Args

    def layer_shares(self, num_layers: int, budget: int, prompt_len: int) -> torch.Tensor:
        return pyramid_shares(num_layers, budget, prompt_len, self.args.window, self.args.beta)
