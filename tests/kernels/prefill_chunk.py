"""A chunk whose keys lie in shuffled pages, for kernels and, as a plain tensor, for their twins."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from attention_plugins.kernels import prefill
from attention_plugins.prefill.base import Chunk
from attention_plugins.prefill.paged import PagedTokens
from kvcache.pages import InterleavedCodec

CUDA = torch.cuda.is_available()
# Triton's interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float16, torch.bfloat16, torch.float32] if CUDA else [torch.float32, torch.float16]


@dataclass(frozen=True)
class Case:
    """`strength` is of the queries; all of the cache but this layer's own tokens is NaN."""

    q_len: int
    k_len: int
    kv_heads: int = 2
    group: int = 2
    dim: int = 16
    page: int = 16
    dtype: torch.dtype = torch.float32
    strength: float = 2.0

    def make(self, device: torch.device) -> tuple[Chunk, Chunk]:
        """The chunk for kernels, and for twins."""
        generator = torch.Generator().manual_seed(self.k_len)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, self.dtype)

        keys, queries = (
            draw(self.kv_heads, self.k_len, self.dim),
            draw(self.q_len, self.kv_heads * self.group, self.dim),
        )
        plain = Chunk(queries * self.strength, keys, self.dim**-0.5, unit=self.page)
        return replace(plain, keys=self.paged(keys), ops=prefill), plain

    def paged(self, keys: torch.Tensor, scale: float = 1.0) -> PagedTokens:
        codec, blocks = InterleavedCodec(self.page, self.dim), -(-self.k_len // self.page)
        total = self.kv_heads * blocks + 3
        table = torch.randperm(total, generator=torch.Generator().manual_seed(1))[: self.kv_heads * blocks]
        table = table.view(self.kv_heads, blocks).to(keys.device)
        unwritten = 0x7F if keys.element_size() == 1 else math.nan  # NaN, in fp8 too
        pages = torch.full((total, 2 * self.page * self.dim), unwritten, dtype=keys.dtype, device=keys.device)
        heads, position = (
            torch.arange(self.kv_heads, device=keys.device)[:, None],
            torch.arange(self.k_len).to(keys.device),
        )
        slots = (table[heads, position // self.page] * self.page + position % self.page).flatten()
        codec.write_tokens(pages, slots, keys.flatten(0, 1), torch.full_like(keys, unwritten).flatten(0, 1))
        dtype = torch.float16 if keys.element_size() == 1 else keys.dtype
        return PagedTokens(pages, table, codec, self.page, self.dim, self.k_len, False, dtype, scale)
