"""`attention_plugins.prefill.search` as one kernel: all steps of the search, for some chunks of a block of queries."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attention_plugins.kernels.prefill.keys import fitting, load_keys, load_rows, paged
from attention_plugins.prefill.base import Chunk
from attention_plugins.prefill.grid import ROWS

SEARCH: dict[str, Any] = {"CHUNKS": 64, "QUERIES": 128, "num_warps": 8, "num_stages": 2}
_VARYING = ["stride", "width", "size", "m", "q_len", "k_len", "q_blocks", "q_stride"]


@triton.jit
def _largest(
    position, queries, stride, first_row, pages, table, width, first_head, heads, q_len, k_len, q_stride,
    GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Largest product of keys at these positions with the block's queries, of some KV heads; NaN if one is."""
    position = tl.minimum(position, k_len - 1)
    rows = (ROWS + q_stride - 1) // q_stride
    parts = (GROUP * rows + QUERIES - 1) // QUERIES
    most = tl.full([KEYS, QUERIES], float("-inf"), tl.float32)
    for step in range(0, heads * parts):
        head = first_head + step // parts
        # Places behind the last query take the last once more, which changes no maximum.
        place = tl.minimum(step % parts * QUERIES + tl.arange(0, QUERIES), GROUP * rows - 1)
        row = tl.minimum(first_row + place % rows * q_stride, q_len - 1)
        q = load_rows(queries, stride, row, head * GROUP + place // rows, row >= 0, DIM, DIM_2)
        k = load_keys(pages, table + head.to(tl.int64) * width, position, position >= 0, PAGE, DIM, DIM_2)
        products = tl.dot(k.to(q.dtype), tl.trans(q), input_precision="ieee")
        most = tl.maximum(most, products, propagate_nan=tl.PropagateNan.ALL)
    spoilt = most != most
    found = tl.max(tl.where(spoilt, float("-inf"), most), 1)
    return tl.where(tl.max(spoilt.to(tl.int32), 1) > 0, float("nan"), found)


@triton.jit(do_not_specialize=_VARYING)
def _search(
    queries, stride, pages, table, width, starts, scores, size, m, q_len, k_len, q_blocks, heads, q_stride, scale,
    GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, ROWS: tl.constexpr,
    CHUNKS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(1), tl.program_id(2)
    number = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)
    line = (head * q_blocks + block).to(tl.int64) * m
    start = tl.load(starts + line + number, mask=number < m, other=0).to(tl.int32)
    best = tl.full([CHUNKS], float("-inf"), tl.float32)
    half = tl.maximum(size // 2, 1)
    while half > 0:
        left = start + half // 2
        other = tl.where(size > 1, half, 0)
        both = tl.reshape(tl.join(left, left + other), [2 * CHUNKS])
        found = _largest(
            both, queries, stride, block * ROWS, pages, table, width, head * heads, heads, q_len, k_len, q_stride,
            GROUP, PAGE, DIM, DIM_2, ROWS, QUERIES, 2 * CHUNKS,
        )  # fmt: skip
        of_left, of_right = tl.split(tl.reshape(found, [CHUNKS, 2]))
        start = tl.where(of_right > of_left, start + other, start)
        best = tl.maximum(of_left, of_right, propagate_nan=tl.PropagateNan.ALL)
        half = half // 2
    tl.store(scores + line + number, best * scale, mask=number < m)


def best_of_chunks(chunk: Chunk, starts: torch.Tensor, size: int, stride: int, share_heads: bool) -> torch.Tensor:
    """See `attention_plugins.prefill.search.best_of_chunks`. Products are float32, where the twin rounds them to the
    keys' dtype."""
    given = paged(chunk)
    heads, blocks, m = starts.shape
    starts = starts.contiguous()
    scores = torch.empty(starts.shape, device=starts.device)
    _search[(triton.cdiv(m, SEARCH["CHUNKS"]), blocks, heads)](
        given.queries, given.queries.stride(0), given.pages, given.table, given.table.stride(0), starts, scores, size,
        m, chunk.q_len, chunk.k_len, blocks, chunk.num_kv_heads if share_heads else 1, stride,
        chunk.scale * given.key_scale,
        **given.shape, ROWS=ROWS, **fitting(SEARCH, given.queries),
    )  # fmt: skip
    return scores
