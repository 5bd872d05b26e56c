"""`attention_plugins.naive.recycle` as kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention_plugins.decode.rows import DecodeRows, LayerCache
from attention_plugins.kernels.tables import VARYING, nan_first, open_row, slot_at, table_of, table_shape


@triton.jit(do_not_specialize=VARYING)
def _append(
    table, layer, modes, want, slots, slots_stride, counts, into, width,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    request, head = tl.program_id(0), tl.program_id(1)
    target = tl.load(into + request)
    if (tl.load(modes + request) & want) == 0 or target < 0:
        return
    length, row = open_row(table, layer, request, head, LAYERS, HEADS, PAGE)
    at = target * HEADS + head
    count = tl.load(counts + at)
    if length > 0 and count < width:
        slot = slot_at(table, row, length - 1, length > 0, HEADS, PAGE)
        tl.store(slots + at.to(tl.int64) * slots_stride + count, slot.to(tl.int32))
        tl.store(counts + at, count + 1)


def append_newest(
    slots: torch.Tensor, counts: torch.Tensor, into: torch.Tensor, rows: DecodeRows, cache: LayerCache, want: int
) -> None:
    """See `attention_plugins.naive.append_newest`; `slots` is contiguous."""
    shape = table_shape(rows)
    _append[(len(rows), shape["HEADS"])](
        table_of(rows), cache.layer, rows.modes, int(want), slots, slots.stride(1), counts, into, slots.shape[-1],
        **shape, num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def _evict(
    modes, want, tokens, slots, slots_stride, counts, into, logits, logits_stride,
    HEADS: tl.constexpr, WIDTH_2: tl.constexpr,
):  # fmt: skip
    request, head = tl.program_id(0), tl.program_id(1)
    target, keep = tl.load(into + request), tl.load(tokens + request)
    if (tl.load(modes + request) & want) == 0 or target < 0:
        return
    at = target * HEADS + head
    count = tl.load(counts + at)
    if count <= keep or keep < 1:
        return
    index = tl.arange(0, WIDTH_2)
    line = logits + (request * HEADS + head).to(tl.int64) * logits_stride
    given = nan_first(tl.load(line + index, mask=index < keep, other=float("inf")))
    least = tl.argmin(given, 0, tie_break_left=True)
    line = slots + at.to(tl.int64) * slots_stride
    tl.store(line + least, tl.load(line + count - 1))
    tl.store(counts + at, keep)


def evict_least(
    slots: torch.Tensor, counts: torch.Tensor, into: torch.Tensor, rows: DecodeRows, logits: torch.Tensor, want: int
) -> None:
    """See `attention_plugins.naive.evict_least`; `slots` and `logits` are contiguous."""
    _evict[(len(rows), slots.shape[1])](
        rows.modes, int(want), rows.tokens, slots, slots.stride(1), counts, into, logits, logits.stride(1),
        HEADS=slots.shape[1], WIDTH_2=triton.next_power_of_2(slots.shape[2]), num_warps=4,
    )  # fmt: skip
