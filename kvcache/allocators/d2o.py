"""D2O's budgets."""

from __future__ import annotations

import torch
from pydantic import Field

from kvcache.allocators.base import LayerAllocator
from kvcache.evidence import Evidence, LayerEvidence
from kvcache.method import Arguments


class D2OLayers(LayerAllocator):
    """Layers whose attention is spread evenly over tokens keep more, those with few strong columns less.

    For each KV head, the variance over tokens of the attention they got from all queries; scaled to 0 ... 1 over the
    heads of the layer, then their mean `v`. A layer's share is `softmax(-v)` over the layers: shares differ by some
    percent. The paper's code measures query heads; here one or two KV heads (on a GPU) always give the same `v`, and
    layers are then alike.

    The code never compresses the first two layers and the last, beyond its budget. Here a request's memory is fixed:
    `whole_first` and `whole_last` (2 and 1 in the code) give such layers the prompt's length, but together no more than
    half of all tokens if there are other layers that get less for it; the others share the rest.

    Formula:
        x_h = variance over tokens of what they got from all queries, by KV head h
        v(l) = mean over h of (x_h - min x) / (max x - min x + 1e-6)
        tokens(l) = budget * layers * softmax_l(-v)
    """

    name = "d2o"
    title = "D2O: by the density of attention"
    paper = "arXiv 2406.13035"
    evidence = Evidence.COLUMN_SUMS

    class Args(Arguments):
        whole_first: int = Field(0, ge=0, le=1024, description="First layers that keep the whole prompt if they can.")
        whole_last: int = Field(0, ge=0, le=1024, description="Last layers that keep the whole prompt if they can.")

    def statistic(self, evidence: LayerEvidence) -> torch.Tensor:
        variances = evidence.column_sums.double().var(-1, correction=0)
        least, most = variances.aminmax()
        # NaN: nothing is known of the layer, and 0 keeps the most.
        return ((variances - least) / (most - least + 1e-6)).mean().nan_to_num(nan=0)

    def shares(
        self, num_layers: int, budget: int, prompt_len: int, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert statistics is not None
        weights = torch.softmax(-statistics, 0)
        layer = torch.arange(num_layers)
        whole = (layer < self.args.whole_first) | (layer >= num_layers - self.args.whole_last)
        count = int(whole.sum())
        if count in (0, num_layers):
            return budget * num_layers * weights
        each = min(float(prompt_len), budget * max(1.0, num_layers / (2 * count)))
        others = weights.masked_fill(whole, 0)
        shares = others * ((budget * num_layers - each * count) / others.sum())
        return torch.where(whole, each, shares)
