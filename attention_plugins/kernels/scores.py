"""`attention_plugins.naive.scores` as kernels; `token_scores` is as fast as the keys can be read."""

from __future__ import annotations

import math
from typing import Literal

import torch
import triton
import triton.language as tl

from attention_plugins.decode.rows import DecodeRows, LayerCache
from attention_plugins.kernels.tables import (
    VARYING,
    contents_of,
    load_queries,
    most_tokens,
    nan_first,
    open_row,
    slot_at,
    table_of,
    table_shape,
    typed_queries,
)

_TOKENS, _WARPS, _STAGES, _PROGRAMS = 128, 4, 3, 4096
_POOLED = 512


def programs_each(n: int, num_kv_heads: int, chunks: int) -> int:
    """Programs that a row and head is shared among: enough that one row alone fills an H100, few enough that rows which
    have nothing to do cost little."""
    return max(1, min(chunks, max(16, _PROGRAMS // (n * num_kv_heads))))


@triton.jit(do_not_specialize=VARYING)
def _token_scores(
    table, layer, modes, want, starts, queries, queries_stride, keys, keys_stride, lse, scores, scores_stride, scale,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr,
    GROUP: tl.constexpr, GROUP_2: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, FP8: tl.constexpr,
    MEAN: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Logits are in powers of two where probabilities are wanted, else as they are."""
    request, head, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if (tl.load(modes + request) & want) == 0:
        return
    length, row = open_row(table, layer, request, head, LAYERS, HEADS, PAGE)
    if program * TOKENS >= length:
        return
    q = load_queries(queries, queries_stride, request, head, GROUP, GROUP_2, DIM, DIM_2, FP8)
    member, dim = tl.arange(0, GROUP_2), tl.arange(0, DIM_2)
    real = (member < GROUP)[:, None]
    if lse is not None:
        denominators = tl.load(lse + (request * HEADS + head) * GROUP + member, mask=member < GROUP, other=0.0)
        denominators = denominators * 1.4426950408889634
    out = scores + head.to(tl.int64) * scores_stride + tl.load(starts + request)
    for first in range(program * TOKENS, length, tl.num_programs(2) * TOKENS):
        place = first + tl.arange(0, TOKENS)
        there = place < length
        slot = slot_at(table, row, place, there, HEADS, PAGE)
        k = tl.load(keys + slot[:, None] * keys_stride + dim, mask=there[:, None] & (dim < DIM), other=0.0)
        each = tl.dot(q, tl.trans(k.to(q.dtype))) * scale
        if lse is not None:
            each = tl.exp2(each - denominators[:, None])
        if MEAN:
            score = nan_first(tl.sum(tl.where(real, each, 0.0), 0) / GROUP)
        else:
            score = tl.max(tl.where(real, nan_first(each), float("-inf")), 0)
        tl.store(out + place, score, mask=there)


def token_scores(
    scores: torch.Tensor,
    rows: DecodeRows,
    cache: LayerCache,
    queries: torch.Tensor,
    want: int,
    lse: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    reduce: Literal["max", "mean"] = "max",
) -> None:
    """See `attention_plugins.naive.token_scores`."""
    shape, (queries, scale, widths) = table_shape(rows), typed_queries(cache, queries)
    scale *= cache.scale
    if labels is None:
        keys, stride = contents_of(cache), 2 * widths["DIM"]
        scale *= cache.quant.key if keys.element_size() == 1 else 1.0
    else:
        keys, stride = labels, labels.stride(0)
    if lse is not None:
        lse, scale = lse.contiguous(), scale * math.log2(math.e)
    chunks = triton.cdiv(min(scores.shape[1], most_tokens(rows)), _TOKENS)
    _token_scores[(len(rows), shape["HEADS"], programs_each(len(rows), shape["HEADS"], chunks))](
        table_of(rows), cache.layer, rows.modes, int(want), rows.starts, queries, queries.stride(0), keys, stride, lse,
        scores, scores.stride(0), scale,
        **shape, **widths, MEAN=reduce == "mean", TOKENS=_TOKENS,
        num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _add_heads(
    table, layer, modes, want, starts, thresholds, scores, stride,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    request, program = tl.program_id(0), tl.program_id(1)
    if (tl.load(modes + request) & want) == 0 or tl.load(thresholds + request) <= 0.0:
        return
    length, _ = open_row(table, layer, request, 0, LAYERS, HEADS, PAGE)
    first, stride = scores + tl.load(starts + request), tl.cast(stride, tl.int64)
    for begin in range(program * TOKENS, length, tl.num_programs(1) * TOKENS):
        place = begin + tl.arange(0, TOKENS)
        there = place < length
        total = tl.zeros([TOKENS], tl.float32)
        for head in tl.static_range(HEADS):
            total += tl.load(first + head * stride + place, mask=there, other=0.0)
        total = nan_first(total)
        for head in tl.static_range(HEADS):
            tl.store(first + head * stride + place, total, mask=there)


def add_heads(scores: torch.Tensor, rows: DecodeRows, cache: LayerCache, want: int) -> None:
    """See `attention_plugins.naive.add_heads`."""
    shape = table_shape(rows)
    chunks = triton.cdiv(min(scores.shape[1], most_tokens(rows)), _POOLED)
    _add_heads[(len(rows), programs_each(len(rows), 1, chunks))](
        table_of(rows), cache.layer, rows.modes, int(want), rows.starts, rows.thresholds, scores, scores.stride(0),
        **shape, TOKENS=_POOLED, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _pool_scores(
    table, layer, modes, want, starts, pooling, scores, pooled, stride,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    request, head, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if (tl.load(modes + request) & want) == 0:
        return
    length, _ = open_row(table, layer, request, head, LAYERS, HEADS, PAGE)
    if program * TOKENS >= length:
        return
    reach, first = tl.load(pooling + request), head.to(tl.int64) * stride + tl.load(starts + request)
    for begin in range(program * TOKENS, length, tl.num_programs(2) * TOKENS):
        place = begin + tl.arange(0, TOKENS)
        best = tl.full([TOKENS], float("-inf"), tl.float32)
        for step in range(-reach, reach + 1):
            near = place + step
            there = (near >= 0) & (near < length)
            best = tl.maximum(best, tl.load(scores + first + near, mask=there, other=float("-inf")))
        tl.store(pooled + first + place, best, mask=place < length)


def pool_scores(pooled: torch.Tensor, scores: torch.Tensor, rows: DecodeRows, cache: LayerCache, want: int) -> None:
    """See `attention_plugins.naive.pool_scores`; both have the same strides.

    Raises:
        ValueError: they have not.
    """
    if pooled.stride() != scores.stride():
        raise ValueError(f"scores of strides {scores.stride()} can't be pooled into {pooled.stride()}")
    shape = table_shape(rows)
    chunks = triton.cdiv(min(scores.shape[1], most_tokens(rows)), _POOLED)
    _pool_scores[(len(rows), shape["HEADS"], programs_each(len(rows), shape["HEADS"], chunks))](
        table_of(rows), cache.layer, rows.modes, int(want), rows.starts, rows.pooling, scores, pooled, scores.stride(0),
        **shape, TOKENS=_POOLED, num_warps=4,
    )  # fmt: skip
