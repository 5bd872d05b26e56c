"""Loki."""

from __future__ import annotations

from typing import Any

import torch

from attention_plugins.decode.base import Place, Reader, Selector, SelectorArgs, shortest
from attention_plugins.decode.rows import DecodeRows, LayerCache, Mode
from kvcache.evidence import dequantise

BASIS = "loki.basis"
"""Name in the calibration: float32 [num_layers, num_kv_heads, head_dim, rank], a head's first principal directions."""


class LokiReader(Reader):
    """Every key's first coordinates in its head's principal directions: a function of the key alone, so it holds for
    whoever shares the page."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        place, g = self.place, self.place.geometry
        self.basis = place.calibration[BASIS].to(place.device, place.dtype)
        # One row more, for what rows without a request write.
        slots = place.num_pages * g.page_size + 1
        self.labels = torch.zeros(slots, self.basis.shape[-1], dtype=place.dtype, device=place.device)
        self.slots = torch.zeros(place.rows, g.num_kv_heads, place.tokens, dtype=torch.int32, device=place.device)
        self.counts = torch.zeros(place.rows, g.num_kv_heads, dtype=torch.int32, device=place.device)
        self.own = torch.arange(place.rows, dtype=torch.int32, device=place.device)

    @classmethod
    def nbytes(cls, place: Place) -> int:
        basis = place.calibration[BASIS]
        labels = (place.num_pages * place.geometry.page_size + 1) * basis.shape[-1]
        lists = 4 * place.rows * (place.geometry.num_kv_heads * (place.tokens + 1) + 1)
        return (labels + basis.numel()) * place.dtype.itemsize + lists

    def whole(self, modes: Mode) -> int:
        return int(bool(modes & Mode.DENSE))

    def prepare(self, pages: torch.Tensor, lengths: torch.Tensor, caches: list[LayerCache], state: int) -> None:
        size = self.place.geometry.page_size
        offsets = torch.arange(size, device=self.place.device)
        for cache in caches:
            for head, (row, length) in enumerate(zip(pages[cache.layer], lengths[cache.layer].tolist(), strict=True)):
                slots = (row[: -(-length // size), None] * size + offsets).flatten()[:length]
                keys, _ = cache.codec.read_tokens(cache.pages, slots)
                self.labels[slots] = self._seen(keys, cache) @ self.basis[cache.layer, head]

    def read(self, out: torch.Tensor, queries: torch.Tensor, rows: DecodeRows, cache: LayerCache, whole: int) -> None:
        n, basis = len(rows), self.basis[cache.layer]
        newest = self.ops.newest_slots(rows, cache)
        keys, _ = cache.codec.read_tokens(cache.pages, newest.flatten())
        labels = torch.einsum("nhd,hdr->nhr", self._seen(keys, cache).unflatten(0, newest.shape), basis)
        target = torch.where((rows.slots >= 0)[:, None], newest, len(self.labels) - 1)
        self.labels.index_copy_(0, target.flatten(), labels.flatten(0, 1))
        if whole:
            self.read_whole(out, queries, rows, cache, Mode.DENSE)
        turned = torch.einsum("nhgd,hdr->nhgr", dequantise(queries, cache.quant.query).to(basis.dtype), basis)
        self.ops.token_scores(self.buffers.scores, rows, cache, turned, Mode.SELECT, labels=self.labels)
        slots, counts, own = self.slots[:n], self.counts[:n], self.own[:n]
        self.ops.top_slots(slots, counts, self.buffers.scores, rows, cache, Mode.SELECT, into=own)
        self.ops.slot_attention(out, queries, slots, counts, own, rows, cache, Mode.SELECT)

    def _seen(self, keys: torch.Tensor, cache: LayerCache) -> torch.Tensor:
        """Stored keys as numbers of the model's dtype."""
        return dequantise(keys, cache.quant.key).to(self.place.dtype)


class Loki(Selector):
    """Ranks tokens by the first principal directions of their keys, and reads the best ones whole.

    The directions of each KV head are measured once per model (`longreach calibrate`), after the rotation, without
    taking off the mean, as in the published code. Coordinates of all cached keys are kept beside the cache: `rank / (2
    head_dim)` of its memory. Of a group of query heads the largest product counts.

    Formula:
        score_j = max over the group of (U^T q) . (U^T k_j), U the first rank directions; the K tokens with the
        highest are read.
    """

    name = "loki"
    title = "Loki: tokens by their keys' principal directions"
    paper = "arXiv 2406.02542"
    reader = LokiReader
    prepares = True
    keeps_metadata = True

    class Args(SelectorArgs):
        min_context: int = shortest(65536)

    needs_calibration = True
