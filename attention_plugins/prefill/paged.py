"""Keys and values of a chunk that lie in the pages of a cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attention_plugins.prefill.base import Reader
from kvcache.pages import PageCodec


@dataclass(frozen=True)
class PagedTokens(Reader):
    """Keys or values of one layer of one request, read from its pages (`attention_plugins.prefill.base.Reader`).

    Kernels take `pages`, `table` and the rest apart and need `kvcache.pages.InterleavedCodec`.

    Attributes:
        pages: the whole cache, [num_pages, 2 * page_size * head_dim], in the dtype that its numbers have.
        table: int64 [num_kv_heads, blocks], the request's pages of the layer, by logical block; at least as many as
            `length` tokens fill.
        codec: how pages are laid out.
        page_size, head_dim: of the cache.
        length: tokens up to the chunk's end.
        values: whether these are the values, or the keys.
        dtype: what is handed out.
        scale: what stored numbers are multiplied with; 1.0 unless the cache is quantised.
    """

    pages: torch.Tensor
    table: torch.Tensor
    codec: PageCodec
    page_size: int
    head_dim: int
    length: int
    values: bool
    dtype: torch.dtype
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.table), self.length, self.head_dim

    def read(self, first: int, last: int) -> torch.Tensor:
        begin, end = first // self.page_size, -(-last // self.page_size)
        found = self.codec.unpack(self._stored[self.table[:, begin:end]])[self.values].flatten(1, 2)
        return self._given(found[:, first - begin * self.page_size : last - begin * self.page_size])

    def gather(self, positions: torch.Tensor) -> torch.Tensor:
        heads = torch.arange(len(self.table), device=positions.device).view(-1, *(1,) * (positions.dim() - 1))
        slots = self.table[heads, positions // self.page_size] * self.page_size + positions % self.page_size
        found = self.codec.read_tokens(self._stored, slots.flatten())[self.values]
        return self._given(found.view(*positions.shape, self.head_dim))

    @property
    def _stored(self) -> torch.Tensor:
        """8-bit floats as bytes: not all that moves bytes knows them."""
        return self.pages.view(torch.uint8) if self.pages.itemsize == 1 else self.pages

    def _given(self, found: torch.Tensor) -> torch.Tensor:
        if found.dtype != self.pages.dtype:
            found = found.contiguous().view(self.pages.dtype)
        return found.to(self.dtype) if self.scale == 1.0 else (found.float() * self.scale).to(self.dtype)
