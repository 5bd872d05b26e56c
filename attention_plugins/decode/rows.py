"""A step's requests as selectors see them, and a layer of the cache that they read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

import torch

from kvcache.evidence import QuantScales
from kvcache.pages import PageCodec, PageGeometry
from kvcache.tables import PageTables


class Mode(IntFlag):
    """What a row does in a step, or in a layer of it; kernels run for the rows whose mode is in a set of these."""

    DENSE = 1
    """Reads everything and selects nothing: its context is short, or it has no selector."""
    SELECT = 2
    """Selects in this step (and reads everything first, where the selector wants that)."""
    REUSE = 4
    """Reads what an earlier step has selected."""
    CHECK = 8
    """Selects or reuses, as the reader finds in each layer; with `SELECT` it selects, for later rows to be checked
    against. No operation runs for it."""


@dataclass(frozen=True)
class DecodeRows:
    """Requests with one query token each. All tensors lie on the cache's device and, in a CUDA graph, in fixed places.

    A token's *place* is its number in the row's sequence of one layer and KV head: 0 ... length - 1, which is the
    position unless the request is compacted. Its *slot* is where it lies: `page * page_size + place % page_size`.

    Attributes:
        tables: of compacted requests.
        slots: int32 [n], each request's page table; `tables.identity` where it isn't compacted; -1 for no request.
        seq_lens: int32 [n], logical lengths, this step's token included.
        block_table: int32 [n, blocks], vLLM's: block ids by logical block number.
        modes: int32 [n], `Mode`; 0 for no request.
        tokens: int32 [n], how many tokens a KV head reads where something is selected (K).
        starts: int32 [n], the row's first column in a buffer of scores, a multiple of the page size; columns up to the
            next row's start are its own, at least as many as its logical length in whole pages.
        places: int32 [n], which of the selector's per-request states is the row's; -1 for none.
        pooling: int32 [n], over how many places to either side a token's score counts for others; 0: for itself alone.
        thresholds: float32 [n], one more number of the request's, which its selector knows the meaning of.
    """

    tables: PageTables
    slots: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    modes: torch.Tensor
    tokens: torch.Tensor
    starts: torch.Tensor
    places: torch.Tensor
    pooling: torch.Tensor
    thresholds: torch.Tensor

    def __len__(self) -> int:
        return len(self.slots)


@dataclass(frozen=True)
class LayerCache:
    """One layer of the KV cache.

    Attributes:
        layer: its index.
        pages: the whole cache, [num_pages, 2 * page_size * head_dim]; fp8 is stored as bytes (uint8).
        geometry, codec: how pages are numbered and laid out; kernels take `InterleavedCodec`.
        quant: what queries, keys and values are multiplied with.
        scale: softmax scale.
        invariant: whether a row's numbers may not depend on what else is in its batch (vLLM's batch-invariant mode).
    """

    layer: int
    pages: torch.Tensor
    geometry: PageGeometry
    codec: PageCodec
    quant: QuantScales
    scale: float
    invariant: bool = False
