"""Mean and covariance of a prompt's queries."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvcache.evidence import LayerEvidence, dequantise
from kvcache.model import ModelFacts
from kvcache.observers.base import Observer

SKIPPED = 4
"""First queries that don't count: the queries of attention sinks are unlike all others."""
# Bounds the memory of one call: queries taken together, 4 bytes each. Small parts are many small steps for a GPU.
_MAX_ELEMENTS = 1 << 23
_COPIES = 3


class QueryMoments(Observer):
    """Mean and covariance of each layer's and query head's queries before RoPE, from the fifth position on.

    Attention sees rotated queries only; they are rotated back. Sums of squares would lose a covariance that is small
    beside the mean (models with a bias in their queries), so what is kept is the spread around the mean so far, and
    chunks are merged as Chan, Golub and LeVeque do (Updating Formulae, 1979). float32; any chunks give the same but
    for rounding. Since nearly all queries are needed, a request that asks for them computes its whole prompt: prefix-
    cache hits don't help it.
    """

    name = "query_moments"

    def __init__(self, num_layers: int, prompt_len: int, model: ModelFacts) -> None:
        super().__init__(num_layers, min(SKIPPED, prompt_len - 1), prompt_len)
        self.num_layers, self.model = num_layers, model
        self._mean: torch.Tensor | None = None
        self._spread: torch.Tensor | None = None

    @staticmethod
    def nbytes(num_layers: int, num_heads: int, head_dim: int) -> int:
        """Memory of one prompt, and of a call."""
        held = num_layers * num_heads * (head_dim + head_dim**2) * 4
        return held + _COPIES * 4 * max(_MAX_ELEMENTS, num_heads * head_dim)

    def observe(
        self, layer: int, position: int, queries: torch.Tensor, so_far: Callable[[], LayerEvidence] | None
    ) -> None:
        """
        Raises:
            RuntimeError: the rotation isn't known; requests for such a policy are refused before they start.
        """
        rotary = self.model.rotary
        if rotary is None:
            raise RuntimeError("query moments are asked for and the model's rotary embedding is not known")
        if self._mean is None or self._spread is None:
            _, num_heads, head_dim = queries.shape
            size = (self.num_layers, num_heads, head_dim)
            self._mean = torch.zeros(size, device=queries.device)
            self._spread = torch.zeros(*size, head_dim, device=queries.device)
        mean, spread = self._mean[layer], self._spread[layer]
        for part in queries.split(max(1, _MAX_ELEMENTS // queries[0].numel())):
            places = torch.arange(position, position + len(part), device=part.device)
            plain = rotary.unrotate(dequantise(part, self.model.query_scale(layer)), places[:, None])
            _merge(mean, spread, position - self.first, plain.transpose(0, 1))
            position += len(part)

    def found(self, layer: int) -> torch.Tensor:
        """float32 [num_heads, 1 + head_dim, head_dim]: the mean, then the covariance (divided by n)."""
        if self._mean is None or self._spread is None:
            raise RuntimeError("no query has come yet")
        return torch.cat((self._mean[layer][:, None], self._spread[layer] / (self.end - self.first)), 1)


def _merge(mean: torch.Tensor, spread: torch.Tensor, seen: int, queries: torch.Tensor) -> None:
    """Take queries [num_heads, n, head_dim] into the mean and the summed outer products around it, in place.

    Args:
        seen: how many these are of so far.
        queries: float32; overwritten.
    """
    n = queries.shape[1]
    own = queries.mean(1)
    queries -= own[:, None]
    step = own - mean
    spread.baddbmm_(queries.transpose(1, 2), queries)
    spread.addcmul_(step[:, :, None], step[:, None], value=seen * n / (seen + n))
    mean.add_(step, alpha=n / (seen + n))
