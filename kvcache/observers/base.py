"""What an observer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch

from kvcache.evidence import LayerEvidence


class Observer(ABC):
    """Watches the queries of one prompt, chunk by chunk and layer by layer, and tells at its end what it saw.

    The prompt's length is known from the start, so each query has its place, and a chunk of any size (one token too)
    may arrive in any step. What an observer needs must be computed: prefix-cache hits are cut at `first`.
    """

    name: ClassVar[str]
    """Under which `LayerEvidence.observed` has what it found."""

    def __init__(self, num_layers: int, first: int, end: int) -> None:
        """Queries of positions first ... end - 1 are wanted, of every layer."""
        self.first, self.end = first, end
        self._seen = [0] * num_layers

    def overlap(self, start: int, end: int) -> tuple[int, int]:
        """The part of positions [start, end) that is wanted; empty when first >= second."""
        return max(start, self.first), min(end, self.end)

    @property
    def missing(self) -> int:
        """Queries not seen yet, summed over layers."""
        return sum(self.end - self.first - seen for seen in self._seen)

    def record(
        self, layer: int, position: int, queries: torch.Tensor, so_far: Callable[[], LayerEvidence] | None = None
    ) -> None:
        """Take in one layer's queries of wanted positions; each comes once, in order.

        Args:
            position: of the first of them.
            queries: [n, num_heads, head_dim], post-RoPE, as the model's attention gets them (fp8 with an fp8 cache).
            so_far: gives the prompt's keys and values up to this chunk's end (`shape[1]` tells where that is, at or
                behind `position + n`). Read only if asked for.

        Raises:
            ValueError: when these are not the positions that come next.
        """
        if position != self.first + self._seen[layer]:
            raise ValueError(f"layer {layer}: query {position} came, {self.first + self._seen[layer]} was next")
        self._seen[layer] += len(queries)
        self.observe(layer, position, queries, so_far)

    @abstractmethod
    def observe(
        self, layer: int, position: int, queries: torch.Tensor, so_far: Callable[[], LayerEvidence] | None
    ) -> None:
        """What `record` is for; the arguments are its."""

    @abstractmethod
    def found(self, layer: int) -> torch.Tensor:
        """What one layer's queries told, when none is missing."""
