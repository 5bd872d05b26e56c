"""`attention_plugins.naive.quest` as kernels; what it does for whole prompts is the twin's."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from attention_plugins.decode.rows import DecodeRows, LayerCache
from attention_plugins.kernels.overlap import after_previous, overlapping
from attention_plugins.kernels.tables import (
    VARYING,
    contents_of,
    nan_first,
    open_row,
    page_at,
    slot_at,
    table_of,
    table_shape,
    typed_queries,
)

_PAGES, _WARPS, _STAGES = 64, 8, 1
_PROGRAMS = 264


@triton.jit
def _as_bounds(numbers):
    """`attention_plugins.naive.quest.as_bounds`, to the bit; by hand, since Triton's interpreter rounds otherwise."""
    bits = tl.minimum(tl.abs(numbers), 448.0).to(tl.uint32, bitcast=True)
    # Three bits of the mantissa stay, ties go to the even one, and what is carried goes into the exponent.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the steps are 2^-9, as those of a float32 between 2^14 and 2^15.
    small = (bits.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) & 15
    code = tl.where(bits < 0x3C800000, small, normal) | (numbers.to(tl.uint32, bitcast=True) >> 31 << 7)
    code = tl.where(numbers != numbers, 127, code)
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _grow(
    table, row, length, contents, bounds, factor,
    HEADS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr,
):  # fmt: skip
    """Let a row's newest key into its page's bounds."""
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
    tl.store(low, _as_bounds(smallest), mask=real)
    tl.store(high, _as_bounds(largest), mask=real)


@triton.jit
def _bounds_of(
    bounds, table, row, first, last,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """Rows of numbers of a program's pages, [PAGES, 2 * DIM_2]."""
    number, channel = first + tl.arange(0, PAGES), tl.arange(0, 2 * DIM_2)
    there = number < last
    page = page_at(table, row, number, there, HEADS).to(tl.int64)
    mask = there[:, None] & (channel < 2 * DIM)
    return tl.load(bounds + page[:, None] * (2 * DIM) + channel, mask=mask, other=0.0)


@triton.jit
def _pinned_of(pins, first, last, PINS: tl.constexpr, PAGES: tl.constexpr):
    """Which of a program's pages are pinned, by the bits of its row and head: 0 or 1, [PAGES]."""
    number = first + tl.arange(0, PAGES)
    bits = tl.zeros([PAGES], tl.int32)
    if PINS:
        bits = tl.load(pins + number // 8, mask=number < last, other=0).to(tl.int32) >> (number % 8) & 1
    return bits


@triton.jit
def _score(
    out, bound, pinned, each, weights, first, last,
    GROUP: tl.constexpr, MAX: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    number, bound = first + tl.arange(0, PAGES), bound.to(tl.float32)
    if MAX:
        GROUP_2: tl.constexpr = each.shape[0]
        member = tl.arange(0, GROUP_2)[:, None]
        score = tl.full([PAGES], float("-inf"), tl.float32)
        for one in tl.static_range(GROUP):
            weights = tl.sum(tl.where(member == one, each, 0.0), 0)
            score = tl.maximum(score, nan_first(tl.sum(bound * weights, 1)))
    else:
        score = nan_first(tl.sum(bound * weights, 1))
    tl.store(out + number, tl.where(pinned != 0, float("inf"), score), mask=number < last)


@triton.jit(do_not_specialize=VARYING)
def _page_scores(
    table, layer, modes, want, starts, queries, queries_stride, contents, key_factor, bounds, scores, scores_stride,
    factor, pins, pins_stride, places, spreads,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr,
    GROUP: tl.constexpr, GROUP_2: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr,
    MAX: tl.constexpr, PINS: tl.constexpr, PAGES: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A page's smallest elements and its largest ones are one row of numbers. So are what they are multiplied with:
    half of a query's elements less a share of their size, then more by it (by all of it, those that are negative, then
    those that are positive). Added over the group beforehand, for a sum.

    The first program of axis 2 grows the newest page's bounds, which nobody scores; the others score.
    """
    request, head, program = tl.program_id(0), tl.program_id(1), tl.program_id(2) - 1
    mode = tl.load(modes + request)
    length, row = open_row(table, layer, request, head, LAYERS, HEADS, PAGE)
    last = (tl.where((mode & want) != 0, length, 0) + PAGE - 1) // PAGE - 1
    out = scores + head.to(tl.int64) * scores_stride + tl.load(starts + request) // PAGE
    first, scored = tl.maximum(program, 0) * PAGES, tl.where(program < 0, 0, last)
    # The kernel before writes no tables, pins, or bounds of pages that have a later one: they may be read this soon.
    bound = _bounds_of(bounds, table, row, first, scored, HEADS, DIM, DIM_2, PAGES)
    marked, own = last, pins
    if PINS:
        place = tl.load(places + request)
        marked, own = tl.where(place < 0, 0, scored), pins + (place * HEADS + head).to(tl.int64) * pins_stride
    pinned = _pinned_of(own, first, marked, PINS, PAGES)
    after_previous(PDL)
    if program < 0:
        if last >= 0:
            _grow(table, row, length, contents, bounds, key_factor, HEADS, PAGE, DIM, DIM_2)
        return
    if first >= last:
        return
    member, channel = tl.arange(0, GROUP_2)[:, None], tl.arange(0, 2 * DIM_2)
    large, real = channel >= DIM, channel < 2 * DIM
    q = queries + request.to(tl.int64) * queries_stride + (head * GROUP + member) * DIM
    q = tl.load(q + tl.where(large, channel - DIM, channel), mask=(member < GROUP) & real, other=0.0)
    q = q.to(tl.float32) * factor
    wider = tl.load(spreads + request) * tl.abs(q)
    each = 0.5 * tl.where(large, q + wider, q - wider)
    weights = tl.sum(each, 0)
    _score(out, bound, pinned, each, weights, first, last, GROUP, MAX, PAGES)
    stride = (tl.num_programs(2) - 1) * PAGES
    for later in tl.range(first + stride, last, stride, num_stages=STAGES):
        bound = _bounds_of(bounds, table, row, later, last, HEADS, DIM, DIM_2, PAGES)
        pinned = _pinned_of(own, later, marked, PINS, PAGES)
        _score(out, bound, pinned, each, weights, later, last, GROUP, MAX, PAGES)


def _programs_each(n: int, num_kv_heads: int, chunks: int) -> int:
    return max(1, min(chunks, max(16, _PROGRAMS // (n * num_kv_heads))))


def page_scores(
    scores: torch.Tensor,
    bounds: torch.Tensor,
    rows: DecodeRows,
    cache: LayerCache,
    queries: torch.Tensor,
    want: int,
    reduce: Literal["sum", "max"] = "sum",
    pins: torch.Tensor | None = None,
) -> None:
    """See `attention_plugins.naive.page_scores`; `bounds` and `pins` are contiguous."""
    shape, contents, (queries, factor, widths) = table_shape(rows), contents_of(cache), typed_queries(cache, queries)
    chunks = triton.cdiv(min(scores.shape[1], rows.block_table.shape[1]), _PAGES)
    _page_scores[(len(rows), shape["HEADS"], 1 + _programs_each(len(rows), shape["HEADS"], chunks))](
        table_of(rows), cache.layer, rows.modes, int(want), rows.starts, queries, queries.stride(0),
        contents, cache.quant.key if contents.element_size() == 1 else 1.0, bounds, scores, scores.stride(0), factor,
        rows.modes if pins is None else pins, 0 if pins is None else pins.stride(1), rows.places, rows.thresholds,
        **shape, GROUP=widths["GROUP"], GROUP_2=triton.next_power_of_2(widths["GROUP"]), DIM=widths["DIM"],
        DIM_2=widths["DIM_2"], MAX=reduce == "max", PINS=pins is not None,
        PAGES=_PAGES, STAGES=_STAGES, num_warps=_WARPS, **overlapping(bounds.device),
    )  # fmt: skip
