"""Which positions a compaction kept, in few numbers: what `"report": "positions"` adds to an answer's usage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kvcache.method import PolicyError
from kvcache.tables import to_host

REPORT = "report"
"""The field of a request's `kv_cache`."""
POSITIONS = "positions"
MOST_BINS = 256


def wanted(words: Mapping[str, Any]) -> bool:
    """Whether a request's words ask for kept positions.

    Raises:
        PolicyError: they ask for something that doesn't exist.
    """
    if REPORT not in words:
        return False
    if words[REPORT] != POSITIONS:
        raise PolicyError(f"kv_cache.{REPORT}", f"there is no such report: {words[REPORT]!r}.", repr(POSITIONS))
    return True


def bin_width(seen: int) -> int:
    """Tokens of a bin, so that `MOST_BINS` bins hold all that a compaction has seen."""
    return -(-seen // MOST_BINS)


@dataclass(frozen=True)
class KeptPositions:
    """How often the positions of each bin are kept.

    Attributes:
        counts: int64 [num_layers, MOST_BINS], (token, KV head) pairs, on the CPU.
        bin_tokens: tokens of a bin.
        kv_heads: KV heads that were counted, of each layer.
    """

    counts: torch.Tensor
    bin_tokens: int
    kv_heads: int

    @classmethod
    def count(cls, positions: torch.Tensor, lengths: torch.Tensor, bin_tokens: int) -> KeptPositions:
        """Count without waiting for a GPU: `counts` is to be read when the compaction's work is done.

        Args:
            positions: int64 [num_layers, num_kv_heads, most], kept ones, a row's own first.
            lengths: int64 [num_layers, num_kv_heads], how many of them are a row's own.
        """
        own = torch.arange(positions.shape[-1], device=positions.device) < lengths[..., None]
        counts = torch.zeros(len(positions), MOST_BINS, dtype=torch.int64, device=positions.device)
        bins = torch.where(own, positions, 0) // bin_tokens
        counts.scatter_add_(1, bins.flatten(1), own.flatten(1).long())
        return cls(to_host(counts), bin_tokens, positions.shape[1])

    def usage(self, whole_from: int, seen: int) -> dict[str, Any]:
        """The field `usage.kv_cache.kept_positions` of an answer.

        Args:
            whole_from, seen: positions that every KV head keeps beside those that were counted: first and end.
        """
        bins = -(-seen // self.bin_tokens)
        whole = torch.bincount(torch.arange(whole_from, seen) // self.bin_tokens, minlength=bins) * self.kv_heads
        by_layer = (self.counts[:, :bins] + whole).tolist()
        return {"tokens": seen, "bin_tokens": self.bin_tokens, "kv_heads": self.kv_heads, "by_layer": by_layer}
