"""`attention_plugins.naive.newest` as a kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention_plugins.decode.rows import DecodeRows, LayerCache
from attention_plugins.kernels.tables import VARYING, open_row, slot_at, table_of, table_shape


@triton.jit(do_not_specialize=VARYING)
def _newest(table, layer, newest, LAYERS: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr):
    request, head = tl.program_id(0), tl.program_id(1)
    length, row = open_row(table, layer, request, head, LAYERS, HEADS, PAGE)
    slot = slot_at(table, row, tl.maximum(length - 1, 0), length > 0, HEADS, PAGE)
    tl.store(newest + request * HEADS + head, tl.where(length > 0, slot, 0))


def newest_slots(rows: DecodeRows, cache: LayerCache) -> torch.Tensor:
    """See `attention_plugins.naive.newest_slots`."""
    shape = table_shape(rows)
    newest = torch.empty(len(rows), shape["HEADS"], dtype=torch.int64, device=rows.slots.device)
    _newest[newest.shape](table_of(rows), cache.layer, newest, **shape, num_warps=1)
    return newest
