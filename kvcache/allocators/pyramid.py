"""PyramidKV's budgets."""

from __future__ import annotations

import torch
from pydantic import Field

from kvcache.allocation import pyramid_shares
from kvcache.allocators.base import LayerAllocator
from kvcache.method import Arguments


class PyramidLayers(LayerAllocator):
    """Lower layers keep more tokens than upper ones, linearly.

    The highest layer keeps 1/`beta` of the budget beside the forced last tokens, the lowest as much more.
    Renormalised: the sum over layers is exactly `layers * budget` (the published integer rule overspends, by 29 %
    at 80 layers and 128 tokens).

    Formula:
        scored tokens of layer l of L, S = budget - window (or recent):  first + l / (L - 1) * (last - first)
        last = S // beta, first = 2 S - last;  if first > prompt - window: first = prompt - window, last = 2 S - first
        prompts shorter than 2 S: S in every layer
    """

    name = "pyramid"
    title = "PyramidKV: less from layer to layer"
    paper = "arXiv 2406.02069"

    class Args(Arguments):
        beta: int = Field(20, ge=1, le=1000, description="Steepness: the highest layer keeps budget / beta.")

    def shares(
        self, num_layers: int, budget: int, prompt_len: int, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        window = getattr(self.args, "window", getattr(self.args, "recent", 0))
        return pyramid_shares(num_layers, budget, prompt_len, window, self.args.beta)
