"""What a scorer may ask for, and the buffers that hold it until the prompt's end."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch


class Evidence(StrEnum):
    """The costliest thing a policy needs, cheapest first (algorithms: 'evidence lattice')."""

    NONE = "none"
    KEYS = "keys"
    WINDOW_QUERIES = "last-w queries"


class QueryWindow:
    """The last `window` post-RoPE queries of one prompt, for all layers, filled while the prompt's chunks pass.

    The prompt's length is known from the start, so each query has its place and a chunk of any size (one token
    too) may arrive in any step. `missing` tells what has not come yet.
    """

    def __init__(
        self,
        num_layers: int,
        window: int,
        num_heads: int,
        head_dim: int,
        prompt_len: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.first = prompt_len - window
        self.window = window
        self.queries = torch.zeros(num_layers, window, num_heads, head_dim, dtype=dtype, device=device)
        self._filled = [set[int]() for _ in range(num_layers)]

    def overlap(self, start: int, end: int) -> tuple[int, int]:
        """The part of positions [start, end) inside the window, as positions; empty when first >= second."""
        return max(start, self.first), min(end, self.first + self.window)

    def record(self, layer: int, position: int, queries: torch.Tensor) -> None:
        """Store queries [n, num_heads, head_dim] of positions `position ... position + n - 1`."""
        slot = position - self.first
        self.queries[layer, slot : slot + queries.shape[0]] = queries
        self._filled[layer].update(range(slot, slot + queries.shape[0]))

    @property
    def missing(self) -> int:
        """Queries not seen yet, summed over layers."""
        return sum(self.window - len(filled) for filled in self._filled)


@dataclass(frozen=True)
class LayerEvidence:
    """What one layer of one request knows when its prompt is done.

    Attributes:
        layer: index of the layer.
        keys: [num_kv_heads, prompt_len, head_dim], post-RoPE, the model's dtype.
        values: the same shape.
        window_queries: [window, num_heads, head_dim], post-RoPE, or None for policies that don't ask for it.
        scale: softmax scale (1/sqrt(head_dim) in most models).
    """

    layer: int
    keys: torch.Tensor
    values: torch.Tensor
    window_queries: torch.Tensor | None
    scale: float

    @property
    def prompt_len(self) -> int:
        return self.keys.shape[1]
