"""Mean queries and mean keys of blocks."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attention_plugins.kernels.prefill.keys import load_keys, paged
from attention_plugins.prefill import scores
from attention_plugins.prefill.base import Chunk
from attention_plugins.prefill.grid import ROWS

KEYS: dict[str, Any] = {"num_warps": 4}
_VARYING = ["width", "k_len", "q_len", "blocks"]


@triton.jit(do_not_specialize=_VARYING)
def _mean_keys(
    pages, table, width, means, k_len, blocks, scale,
    PAGE: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, BLOCK: tl.constexpr, BLOCK_2: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(0), tl.program_id(1)
    place, dim = tl.arange(0, BLOCK_2), tl.arange(0, DIM_2)
    position = block * BLOCK + place
    there = (place < BLOCK) & (position < k_len)
    k = load_keys(pages, table + head.to(tl.int64) * width, position, there, PAGE, DIM, DIM_2)
    mean = tl.sum(k.to(tl.float32), 0) * scale / tl.minimum(k_len - block * BLOCK, BLOCK)
    tl.store(means + (head * blocks + block).to(tl.int64) * DIM + dim, mean, mask=dim < DIM)


@triton.jit(do_not_specialize=_VARYING)
def _mean_queries(
    queries, stride, means, q_len, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, ROWS: tl.constexpr
):
    block, head = tl.program_id(0), tl.program_id(1)
    row, dim = block * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM_2)
    at = row.to(tl.int64) * stride + head * DIM
    q = tl.load(queries + at[:, None] + dim, mask=(row < q_len)[:, None] & (dim < DIM), other=0.0)
    mean = tl.sum(q.to(tl.float32), 0) / tl.minimum(q_len - block * ROWS, ROWS)
    tl.store(means + (block * HEADS + head).to(tl.int64) * DIM + dim, mean, mask=dim < DIM)


def pooled_keys(chunk: Chunk, block: int) -> torch.Tensor:
    """See `attention_plugins.prefill.scores.pooled_keys`."""
    given, blocks = paged(chunk), chunk.grid.k_blocks(block)
    (kv_heads, _), shape = given.heads, dict(given.shape)
    del shape["GROUP"]
    means = torch.empty(kv_heads, blocks, shape["DIM"], device=given.queries.device)
    _mean_keys[(blocks, kv_heads)](
        given.pages, given.table, given.table.stride(0), means, chunk.k_len, blocks, given.key_scale,
        **shape, BLOCK=block, BLOCK_2=triton.next_power_of_2(block), **KEYS,
    )  # fmt: skip
    return means


def pooled_queries(chunk: Chunk) -> torch.Tensor:
    """See `attention_plugins.prefill.scores.pooled_queries`."""
    given, blocks = paged(chunk), chunk.grid.q_blocks
    means = torch.empty(blocks, chunk.num_heads, given.shape["DIM"], device=given.queries.device)
    _mean_queries[(blocks, chunk.num_heads)](
        given.queries, given.queries.stride(0), means, chunk.q_len,
        HEADS=chunk.num_heads, DIM=given.shape["DIM"], DIM_2=given.shape["DIM_2"], ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return means


def block_logits(chunk: Chunk, block: int, keys: torch.Tensor | None = None) -> torch.Tensor:
    """See `attention_plugins.prefill.scores.block_logits`: means are few, and a library multiplies them."""
    return scores.block_logits(chunk, block, keys)
