"""Keys of a chunk as kernels read them: from the pages of the cache."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from attention_plugins.prefill.base import Chunk
from attention_plugins.prefill.paged import PagedTokens
from kvcache.pages import InterleavedCodec

PROGRAMS = 264
"""Two for each multiprocessor of an H100."""
MAX_SPLITS = 64
TUNED_BYTES = 256


def fitting(sizes: dict[str, Any], queries: torch.Tensor) -> dict[str, Any]:
    """A kernel's sizes for these queries. They are tuned for heads of 128 numbers of two bytes at most; of wider ones
    half as many rows, and no loads ahead, are what fits in shared memory."""
    width = queries.shape[-1] * queries.element_size()
    while width > TUNED_BYTES:
        halves = ("ROWS", "MEMBERS", "QUERIES")
        halved = {name: max(1, size // 2) if name in halves else size for name, size in sizes.items()}
        sizes, width = halved | {"num_stages": 1}, width // 2
    return sizes


class Paged(NamedTuple):
    """A chunk's tensors.

    Attributes:
        queries: [q_len, num_heads, head_dim], no gaps within a query.
        pages: the whole cache, fp8 typed as such.
        table: int64 [num_kv_heads, blocks], no gaps within a row.
        scale: what products are multiplied with; logits are then powers of two.
        key_scale: what stored keys are multiplied with.
        shape: compile-time constants.
    """

    queries: torch.Tensor
    pages: torch.Tensor
    table: torch.Tensor
    scale: float
    key_scale: float
    shape: dict[str, Any]

    @property
    def heads(self) -> tuple[int, int]:
        """KV heads, and query heads of each."""
        return len(self.table), self.shape["GROUP"]


def paged(chunk: Chunk) -> Paged:
    """
    Raises:
        ValueError: the keys don't lie in pages, token by token.
    """
    keys = chunk.keys
    if not isinstance(keys, PagedTokens) or not isinstance(keys.codec, InterleavedCodec):
        raise ValueError("the kernels read keys from an InterleavedCodec's pages")
    pages, table, queries = keys.pages, keys.table, chunk.queries
    if pages.element_size() == 1:
        pages = pages.view(torch.float8_e4m3fn)
    dim = keys.head_dim
    if queries.stride()[1:] != (dim, 1):
        queries = queries.contiguous()
    if table.stride(1) != 1:
        table = table.contiguous()
    shape = {
        "GROUP": chunk.num_heads // chunk.num_kv_heads, "PAGE": keys.page_size,
        "DIM": dim, "DIM_2": max(16, triton.next_power_of_2(dim)),
    }  # fmt: skip
    return Paged(queries, pages, table, chunk.scale * keys.scale * math.log2(math.e), keys.scale, shape)


@triton.jit
def load_keys(pages, table, position, there, PAGE: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr):
    """Keys of these positions: [positions, DIM_2]; zeros where there is none. `table`: the head's pages, int64."""
    position = tl.where(there, position, 0)
    page = tl.load(table + position // PAGE, mask=there, other=0)
    at = (page * PAGE + position % PAGE) * (2 * DIM)
    dim = tl.arange(0, DIM_2)
    return tl.load(pages + at[:, None] + dim, mask=there[:, None] & (dim < DIM), other=0.0)


@triton.jit
def load_rows(queries, stride, row, head, real, DIM: tl.constexpr, DIM_2: tl.constexpr):
    """Queries of these rows and heads: [rows, DIM_2]; zeros where they aren't real."""
    at = row.to(tl.int64) * stride + head * DIM
    dim = tl.arange(0, DIM_2)
    return tl.load(queries + at[:, None] + dim, mask=real[:, None] & (dim < DIM), other=0.0)
