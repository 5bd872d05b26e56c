"""`attention_plugins.prefill.antidiagonals` as one product of matrices, and a pass over what it leaves.

Tiles' products are computed once. Of each row of tiles and block of 128 keys the logarithm of a sum of powers is kept,
the softmax's denominators come from those.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attention_plugins.kernels.prefill.keys import paged
from attention_plugins.prefill.base import Chunk
from attention_plugins.prefill.grid import ROWS

PRODUCTS: dict[str, Any] = {"M": 128, "N": 256, "K": 64, "num_warps": 8, "num_stages": 3}
LARGEST: dict[str, Any] = {"M": 128, "N": 128, "K": 64, "num_warps": 8, "num_stages": 4}
"""Of tiles as large as a block: there are few of them, and all of a GPU is to have some."""
BYTES = 64 << 20
"""Most memory that sums of powers take, if one KV head's are less; heads take turns."""
_VARYING = ["width", "q_len", "k_len", "first_head", "rows", "blocks", "q_blocks", "kb"]


@triton.jit(do_not_specialize=_VARYING)
def _tile_powers(
    queries, stride, pages, table, width, powers, first_head, q_len, k_len, rows, blocks, scale,
    GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, STRIDE: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Log2 of the sum of powers of each row of tiles and block of keys. Of a tile, PART keys lie in one page.

    Rows of a group's members lie behind each other, so that a few large tiles of several members read keys once.
    """
    head = tl.program_id(2)
    line, column = tl.program_id(0) * M + tl.arange(0, M), tl.program_id(1) * N + tl.arange(0, N)
    # Lines behind the last one take it once more, and write nothing.
    real = tl.minimum(line, GROUP * rows - 1)
    member, row = real // rows, real % rows
    earliest, latest = tl.min(row, 0), tl.max(row, 0)
    if tl.program_id(1) * N * STRIDE >= k_len - q_len + (latest + 1) * STRIDE:
        found = tl.full([M, N * STRIDE // BLOCK], float("-inf"), tl.float32)
        _store_powers(powers, found, head, line, rows, blocks, GROUP, STRIDE, BLOCK, N)
        return
    key_head, dim = first_head + head, tl.arange(0, K)
    start = column * STRIDE
    of = table + key_head.to(tl.int64) * width
    query = queries + (key_head * GROUP + member)[:, None] * DIM
    acc = tl.zeros([M, N], tl.float32)
    for part in tl.static_range(STRIDE // PART):
        first = start + part * PART
        page = tl.load(of + first // PAGE, mask=first < k_len, other=0)
        key = pages + (page * PAGE + first % PAGE) * (2 * DIM)
        for step in range(PART * (DIM_2 // K)):
            place, at = step // (DIM_2 // K), step % (DIM_2 // K) * K + dim
            number = row * STRIDE + (STRIDE - 1 - part * PART - place)
            q = tl.load(
                query + number.to(tl.int64)[:, None] * stride + at,
                mask=(number < q_len)[:, None] & (at < DIM)[None, :], other=0.0,
            )  # fmt: skip
            k = tl.load(
                key[:, None] + (place * (2 * DIM) + at)[None, :],
                mask=(first + place < k_len)[:, None] & (at < DIM)[None, :], other=0.0,
            )  # fmt: skip
            acc = tl.dot(q, tl.trans(k.to(q.dtype)), acc, input_precision="ieee")
    last_row, last_key = (latest + 1) * STRIDE, (tl.program_id(1) * N + N) * STRIDE
    if (last_row > q_len) | (last_key > k_len):
        pairs = tl.minimum(q_len - row * STRIDE, STRIDE)[:, None] + tl.minimum(k_len - start, STRIDE)[None, :] - STRIDE
        acc = acc * (scale / tl.maximum(pairs, 1).to(tl.float32))
    else:
        acc = acc * (scale / STRIDE)
    if last_key > k_len - q_len + earliest * STRIDE:
        above = start[None, :] >= k_len - q_len + row[:, None] * STRIDE + STRIDE
        acc = tl.where(above | (start >= k_len)[None, :], float("-inf"), acc)
    parts = tl.reshape(acc, [M, N * STRIDE // BLOCK, BLOCK // STRIDE])
    most = tl.maximum(tl.max(parts, 2), -1e38)
    found = most + tl.log2(tl.sum(tl.exp2(parts - most[:, :, None]), 2))
    _store_powers(powers, found, head, line, rows, blocks, GROUP, STRIDE, BLOCK, N)


@triton.jit
def _store_powers(
    powers, found, head, line, rows, blocks,
    GROUP: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1) * (N * STRIDE // BLOCK) + tl.arange(0, N * STRIDE // BLOCK)
    out = powers + (head * GROUP * rows + line).to(tl.int64)[:, None] * blocks + block
    tl.store(out, found, mask=(line < GROUP * rows)[:, None] & (block < blocks)[None, :])


@triton.jit(do_not_specialize=_VARYING)
def _masses(
    powers, masses, q_len, rows, blocks, q_blocks,
    STRIDE: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Softmax over each row of tiles, and sums over the rows of a block of queries."""
    block, head = tl.program_id(0), tl.program_id(1)
    row = block * ROWS + tl.arange(0, ROWS)
    real = row < rows
    line = powers + (head * rows + row).to(tl.int64)[:, None] * blocks
    most = tl.full([ROWS], -1e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, blocks, N):
        at = start + tl.arange(0, N)
        part = tl.load(line + at, mask=real[:, None] & (at < blocks)[None, :], other=float("-inf"))
        new = tl.maximum(most, tl.max(part, 1))
        total = total * tl.exp2(most - new) + tl.sum(tl.exp2(part - new[:, None]), 1)
        most = new
    lse = tl.where(real, most + tl.log2(total), 0.0)
    weight = tl.maximum(tl.minimum(q_len - row * STRIDE, STRIDE), 0).to(tl.float32) / STRIDE
    for start in range(0, blocks, N):
        at = start + tl.arange(0, N)
        part = tl.load(line + at, mask=real[:, None] & (at < blocks)[None, :], other=float("-inf"))
        mass = tl.sum(tl.exp2(part - lse[:, None]) * weight[:, None], 0)
        tl.store(masses + (head * q_blocks + block).to(tl.int64) * blocks + at, mass, mask=at < blocks)


def antidiagonal_masses(chunk: Chunk, stride: int) -> torch.Tensor:
    """See `attention_plugins.prefill.antidiagonals.antidiagonal_masses`."""
    given = paged(chunk)
    kv_heads, group = given.heads
    rows, blocks, q_blocks = triton.cdiv(chunk.q_len, stride), chunk.grid.k_blocks(ROWS), chunk.grid.q_blocks
    masses = torch.empty(chunk.num_heads, q_blocks, blocks, device=chunk.queries.device)
    slab = max(1, min(kv_heads, BYTES // (4 * group * rows * blocks)))
    powers = torch.empty(slab * group, rows, blocks, device=masses.device)
    sizes = dict(LARGEST if stride == ROWS else PRODUCTS)
    # A short chunk has fewer rows of tiles than a program takes.
    sizes["M"] = min(sizes["M"], max(16, triton.next_power_of_2(group * rows)))
    sizes["K"] = min(sizes["K"], given.shape["DIM_2"])
    columns = triton.cdiv(triton.cdiv(chunk.k_len, stride), sizes["N"])
    for first in range(0, kv_heads, slab):
        heads = min(slab, kv_heads - first)
        _tile_powers[(triton.cdiv(group * rows, sizes["M"]), columns, heads)](
            given.queries, given.queries.stride(0), given.pages, given.table, given.table.stride(0), powers, first,
            chunk.q_len, chunk.k_len, rows, blocks, given.scale, **given.shape, STRIDE=stride,
            PART=min(stride, given.shape["PAGE"]), BLOCK=ROWS, **sizes,
        )  # fmt: skip
        _masses[(q_blocks, heads * group)](
            powers, masses[first * group :], chunk.q_len, rows, blocks, q_blocks,
            STRIDE=stride, ROWS=ROWS // stride, N=256, num_warps=4,
        )  # fmt: skip
    return masses
