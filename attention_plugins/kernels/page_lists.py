"""`attention_plugins.naive.page_lists` as one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention_plugins.naive.page_lists import empty_lists
from attention_plugins.prefill.base import Plan
from attention_plugins.prefill.grid import ROWS

_UNITS = 2048
# Numbers that differ from chunk to chunk are no compile-time constants: a new one must not wait for a compiler.
_VARYING = ["mask_head", "mask_block", "table_stride", "tables_stride", "first_head", "blocks", "offset", "k_len"]


@triton.jit(do_not_specialize=_VARYING)
def _page_lists(
    mask, mask_head, mask_block, table, table_stride, tables, tables_stride, lengths, first_head, blocks, offset, k_len,
    GROUP: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    block, number = tl.program_id(0), tl.program_id(1)
    head = first_head + number
    last_row = tl.minimum(offset + (block + 1) * ROWS, k_len) - 1
    end = last_row // UNIT + 1
    flags = mask + head.to(tl.int64) * mask_head + block.to(tl.int64) * mask_block
    pages = table + (head // GROUP).to(tl.int64) * table_stride
    row = number * blocks + block
    line = tables + row.to(tl.int64) * tables_stride
    count = 0
    for start in range(0, end, UNITS):
        unit = start + tl.arange(0, UNITS)
        chosen = tl.load(flags + unit, mask=unit < end, other=0) != 0
        page = tl.load(pages + unit, mask=chosen, other=0)
        place = count + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(line + place, page.to(tl.int32), mask=chosen)
        count += tl.sum(chosen.to(tl.int32), 0)
    tl.store(lengths + row, (count - 1) * UNIT + last_row % UNIT + 1)


def page_lists(
    plan: Plan,
    table: torch.Tensor,
    heads: tuple[int, int] | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `attention_plugins.naive.page_lists.page_lists`; `out`'s tables may have gaps between their rows."""
    grid, (first, last) = plan.grid, heads or (0, len(plan.mask))
    tables, lengths = out or empty_lists(plan, last - first)
    mask = plan.mask.view(torch.uint8)
    if grid.k_units > 1 and mask.stride(2) != 1:
        mask = mask.contiguous()
    _page_lists[(grid.q_blocks, last - first)](
        mask, mask.stride(0), mask.stride(1), table, table.stride(0), tables, tables.stride(0), lengths,
        first, grid.q_blocks, grid.offset, grid.k_len,
        GROUP=len(plan.mask) // len(table), UNIT=grid.unit, ROWS=ROWS, UNITS=_UNITS, num_warps=8,
    )  # fmt: skip
    return tables, lengths
