"""What the twins share: where a layer's tokens lie, and which rows they act on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from attention_plugins.decode.rows import DecodeRows, LayerCache
from attention_plugins.page_rows import page_rows
from kvcache.evidence import dequantise


@dataclass(frozen=True)
class Sequences:
    """A layer's tokens, row by row.

    Attributes:
        pages: int64 [n, num_kv_heads, width], in the order of tokens; what is behind a row's pages is any page.
        lengths: int64 [n, num_kv_heads], tokens; 0 for no request.
        page_size: tokens.
    """

    pages: torch.Tensor
    lengths: torch.Tensor
    page_size: int

    @classmethod
    def of(cls, rows: DecodeRows, cache: LayerCache) -> Sequences:
        pages, lengths = page_rows(rows.tables, rows.slots, rows.seq_lens, rows.block_table, only=cache.layer)
        shape = (len(rows), cache.geometry.num_kv_heads)
        return cls(pages[0].unflatten(0, shape).long(), lengths[0].view(shape).long(), cache.geometry.page_size)

    def slots(self, row: int, head: int, places: torch.Tensor | None = None) -> torch.Tensor:
        """Slots of these places, or of all: int64 [k] -> int64 [k]."""
        if places is None:
            places = torch.arange(int(self.lengths[row, head]), device=self.pages.device)
        return self.pages[row, head, places // self.page_size] * self.page_size + places % self.page_size


def wanted(rows: DecodeRows, want: int) -> list[int]:
    """Rows that hold a request whose mode is in the set."""
    there = (rows.slots >= 0) & (rows.seq_lens > 0)
    return (there & (rows.modes & int(want) != 0)).nonzero().flatten().tolist()


def wanted_heads(rows: DecodeRows, cache: LayerCache, want: int) -> Iterator[tuple[int, int]]:
    """Their (row, KV head)."""
    return ((row, head) for row in wanted(rows, want) for head in range(cache.geometry.num_kv_heads))


def read(cache: LayerCache, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of these slots, real numbers: int64 [k] -> float32 [k, head_dim] each."""
    keys, values = cache.codec.read_tokens(cache.pages, slots)
    return dequantise(keys, cache.quant.key).float(), dequantise(values, cache.quant.value).float()


def real_queries(cache: LayerCache, queries: torch.Tensor) -> torch.Tensor:
    """Queries as float32, those of fp8 with their factor."""
    return dequantise(queries, cache.quant.query).float()


def nan_first(scores: torch.Tensor) -> torch.Tensor:
    """A score that isn't a number counts as the highest: what is broken is read, as dense attention would."""
    return scores.masked_fill(scores.isnan(), math.inf)


def best(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k highest, ties to the lower index: float32 [m] -> int64 [min(k, m)], ascending."""
    return nan_first(scores).argsort(descending=True, stable=True)[:k].sort().values
