"""`attention_plugins.naive.place_slots` as a kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention_plugins.decode.rows import DecodeRows, LayerCache
from attention_plugins.kernels.tables import VARYING, open_row, slot_at, table_of, table_shape

_PLACES = 1024


@triton.jit(do_not_specialize=VARYING)
def _place_slots(
    table, layer, modes, want, places, places_stride, counts, slots, slots_stride,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, LISTS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    request, head = tl.program_id(0), tl.program_id(1)
    source = request * LISTS + head % LISTS
    if (tl.load(modes + request) & want) == 0:
        return
    count = tl.load(counts + source)
    if tl.program_id(2) * PLACES >= count:
        return
    length, row = open_row(table, layer, request, head, LAYERS, HEADS, PAGE)
    index = tl.program_id(2) * PLACES + tl.arange(0, PLACES)
    there = index < tl.where(length > 0, count, 0)
    place = tl.load(places + source.to(tl.int64) * places_stride + index, mask=there, other=0)
    slot = slot_at(table, row, tl.minimum(place, length - 1), there, HEADS, PAGE)
    tl.store(slots + (request * HEADS + head).to(tl.int64) * slots_stride + index, slot.to(tl.int32), mask=there)


def place_slots(
    slots_out: torch.Tensor, places: torch.Tensor, counts: torch.Tensor, rows: DecodeRows, cache: LayerCache, want: int
) -> None:
    """See `attention_plugins.naive.place_slots`; rows of places and slots lie one behind the other."""
    shape, width = table_shape(rows), places.shape[-1]
    _place_slots[(len(rows), shape["HEADS"], triton.cdiv(width, _PLACES))](
        table_of(rows), cache.layer, rows.modes, int(want), places, places.stride(1), counts,
        slots_out, slots_out.stride(1),
        **shape, LISTS=places.shape[1], PLACES=_PLACES, num_warps=4,
    )  # fmt: skip
