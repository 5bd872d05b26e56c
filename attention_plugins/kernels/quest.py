"""`attention_plugins.naive.quest` as kernels; what it does for whole prompts is the twin's."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from attention_plugins.decode.rows import DecodeRows, LayerCache
from attention_plugins.kernels.scores import programs_each
from attention_plugins.kernels.tables import (
    VARYING,
    contents_of,
    load_queries,
    nan_first,
    open_row,
    page_at,
    slot_at,
    table_of,
    table_shape,
    typed_queries,
)

_PAGES = 64


@triton.jit(do_not_specialize=VARYING)
def _grow(
    table, layer, modes, want, contents, bounds, factor,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr,
):  # fmt: skip
    request, head = tl.program_id(0), tl.program_id(1)
    if (tl.load(modes + request) & want) == 0:
        return
    length, row = open_row(table, layer, request, head, LAYERS, HEADS, PAGE)
    if length <= 0:
        return
    slot = slot_at(table, row, length - 1, length > 0, HEADS, PAGE)
    dim = tl.arange(0, DIM_2)
    real = dim < DIM
    key = tl.load(contents + slot * (2 * DIM) + dim, mask=real, other=0.0).to(tl.float32) * factor
    low = bounds + slot // PAGE * (2 * DIM) + dim
    high = low + DIM
    # Rounding keeps the order, so that it may come last.
    smallest, largest = key, key
    if (length - 1) % PAGE != 0:
        smallest = tl.minimum(tl.load(low, mask=real, other=0.0).to(tl.float32), key, propagate_nan=tl.PropagateNan.ALL)
        largest = tl.maximum(tl.load(high, mask=real, other=0.0).to(tl.float32), key, propagate_nan=tl.PropagateNan.ALL)
    tl.store(low, smallest.to(bounds.dtype.element_ty), mask=real)
    tl.store(high, largest.to(bounds.dtype.element_ty), mask=real)


def grow_bounds(bounds: torch.Tensor, rows: DecodeRows, cache: LayerCache, want: int) -> None:
    """See `attention_plugins.naive.grow_bounds`; `bounds` is contiguous."""
    shape, contents, dim = table_shape(rows), contents_of(cache), cache.geometry.head_dim
    _grow[(len(rows), shape["HEADS"])](
        table_of(rows), cache.layer, rows.modes, int(want), contents, bounds,
        cache.quant.key if contents.element_size() == 1 else 1.0,
        **shape, DIM=dim, DIM_2=triton.next_power_of_2(dim), num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _page_scores(
    table, layer, modes, want, starts, queries, queries_stride, bounds, scores, scores_stride, factor,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr,
    GROUP: tl.constexpr, GROUP_2: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, FP8: tl.constexpr,
    MAX: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    request, head, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if (tl.load(modes + request) & want) == 0:
        return
    length, row = open_row(table, layer, request, head, LAYERS, HEADS, PAGE)
    total = (length + PAGE - 1) // PAGE
    if program * PAGES >= total:
        return
    q = load_queries(queries, queries_stride, request, head, GROUP, GROUP_2, DIM, DIM_2, FP8)
    positive, negative = tl.where(q < 0.0, 0.0, q).to(q.dtype), tl.where(q > 0.0, 0.0, q).to(q.dtype)
    real, dim = (tl.arange(0, GROUP_2) < GROUP)[:, None], tl.arange(0, DIM_2)
    out = scores + head.to(tl.int64) * scores_stride + tl.load(starts + request) // PAGE
    for first in range(program * PAGES, total, tl.num_programs(2) * PAGES):
        number = first + tl.arange(0, PAGES)
        there = number < total
        page = page_at(table, row, number, there, HEADS).to(tl.int64)
        at, mask = bounds + page[:, None] * (2 * DIM) + dim, there[:, None] & (dim < DIM)
        low, high = tl.load(at, mask=mask, other=0.0), tl.load(at + DIM, mask=mask, other=0.0)
        each = tl.dot(positive, tl.trans(high.to(q.dtype)))
        each = tl.dot(negative, tl.trans(low.to(q.dtype)), acc=each) * factor
        if MAX:
            score = tl.max(tl.where(real, nan_first(each), float("-inf")), 0)
        else:
            score = nan_first(tl.sum(tl.where(real, each, 0.0), 0))
        tl.store(out + number, score, mask=there)


def page_scores(
    scores: torch.Tensor,
    bounds: torch.Tensor,
    rows: DecodeRows,
    cache: LayerCache,
    queries: torch.Tensor,
    want: int,
    reduce: Literal["sum", "max"] = "sum",
) -> None:
    """See `attention_plugins.naive.page_scores`; `bounds` is contiguous."""
    shape, (queries, factor, widths) = table_shape(rows), typed_queries(cache, queries)
    chunks = triton.cdiv(min(scores.shape[1], rows.block_table.shape[1]), _PAGES)
    _page_scores[(len(rows), shape["HEADS"], programs_each(len(rows), shape["HEADS"], chunks))](
        table_of(rows), cache.layer, rows.modes, int(want), rows.starts, queries, queries.stride(0), bounds,
        scores, scores.stride(0), factor,
        **shape, **widths, MAX=reduce == "max", PAGES=_PAGES, num_warps=4,
    )  # fmt: skip
