"""The observation window."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kvcache.evidence import LayerEvidence
from kvcache.observers.base import Observer


class QueryWindow(Observer):
    """The last `window` queries of a prompt, kept as they are.

    Memory is taken when the first of them comes: a prompt of many chunks holds none before its last ones.
    """

    name = "window_queries"

    def __init__(self, num_layers: int, window: int, prompt_len: int) -> None:
        super().__init__(num_layers, prompt_len - window, prompt_len)
        self.num_layers, self.window = num_layers, window
        self._queries: torch.Tensor | None = None

    @property
    def queries(self) -> torch.Tensor:
        """[num_layers, window, num_heads, head_dim]."""
        if self._queries is None:
            raise RuntimeError("no query of the window has come yet")
        return self._queries

    def observe(
        self, layer: int, position: int, queries: torch.Tensor, so_far: Callable[[], LayerEvidence] | None
    ) -> None:
        if self._queries is None:
            self._queries = queries.new_empty(self.num_layers, self.window, *queries.shape[1:])
        slot = position - self.first
        self._queries[layer, slot : slot + len(queries)] = queries

    def found(self, layer: int) -> torch.Tensor:
        """[window, num_heads, head_dim]."""
        return self.queries[layer]
