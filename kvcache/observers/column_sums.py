"""Column sums."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvcache.evidence import LayerEvidence
from kvcache.observers.base import Observer
from kvcache.scorers import observed_column_sums


class ColumnSums(Observer):
    """What every token of a prompt gets from all of its queries.

    The causal softmax's probabilities, summed over queries and averaged over the query heads of a KV head; a softmax of
    its own for each query, so that chunks simply add up. It is a second pass over queries and keys beside the model's
    attention, in pieces: no matrix of prompt times prompt.

    All queries must be seen, so prefix-cache hits are off for a policy that asks for this. Memory is taken when
    the first query comes: 4 bytes for each layer, KV head and token.
    """

    name = "column_sums"

    def __init__(self, num_layers: int, prompt_len: int) -> None:
        super().__init__(num_layers, 0, prompt_len)
        self.num_layers = num_layers
        self._sums: torch.Tensor | None = None

    def observe(
        self, layer: int, position: int, queries: torch.Tensor, so_far: Callable[[], LayerEvidence] | None
    ) -> None:
        if so_far is None:
            raise ValueError("column sums need the keys that these queries see")
        sums = observed_column_sums(so_far(), queries, position)
        if self._sums is None:
            self._sums = sums.new_zeros(self.num_layers, len(sums), self.end)
        self._sums[layer, :, : sums.shape[1]] += sums

    def found(self, layer: int) -> torch.Tensor:
        """float32 [num_kv_heads, prompt_len]."""
        if self._sums is None:
            raise RuntimeError("no query has come yet")
        return self._sums[layer]
