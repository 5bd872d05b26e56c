"""`attention_plugins.page_rows.page_rows` as one launch per layer, for CUDA graphs: no shape depends on the data."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcache.tables import PageTables


@triton.jit(do_not_specialize=["layer"])
def _page_rows(
    slots, seq_lens, block_table, block_table_stride,
    blocks, blocks_stride, num_blocks, first_block, counts, starts, layer_base,
    pages, pages_stride, lengths,
    layer, block_stride,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    request, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + request)
    here = slot >= 0
    slot = tl.maximum(slot, 0).to(tl.int64)
    place = (slot * LAYERS + layer) * HEADS + head
    count, start = tl.load(counts + place), tl.load(starts + place)
    n, first = tl.load(num_blocks + slot), tl.load(first_block + slot)
    tail = tl.load(seq_lens + request) - first * PAGE
    row = request * HEADS + head
    tl.store(lengths + row, tl.where(here, count * PAGE + tail, 0))
    total = tl.where(here, count + (tail + PAGE - 1) // PAGE, 0)
    own_base = tl.load(layer_base + layer)
    for first_column in range(0, total, COLUMNS):
        column = first_column + tl.arange(0, COLUMNS)
        kept = column < count
        index = start + column
        base = tl.load(layer_base + index // (n * HEADS), mask=kept, other=0)
        block = tl.load(blocks + slot * blocks_stride + index % n, mask=kept, other=0)
        page = base + block * block_stride + index // n % HEADS
        new = (column >= count) & (column < total)
        later = first + column - count
        block = tl.load(block_table + request.to(tl.int64) * block_table_stride + later, mask=new, other=0)
        page = tl.where(kept, page, own_base + block * block_stride + head)
        tl.store(pages + row.to(tl.int64) * pages_stride + column, page, mask=column < total)


def page_rows_into(
    pages: torch.Tensor,
    lengths: torch.Tensor,
    tables: PageTables,
    layer: int,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
) -> None:
    """Write one layer's rows.

    Args:
        pages: int32 [n * num_kv_heads, width], wide enough for every row; entries behind a row's pages stay.
        lengths: int32 [n * num_kv_heads].
        slots, seq_lens, block_table: see the twin.
    """
    g = tables.geometry
    _page_rows[(len(slots), g.num_kv_heads)](
        slots, seq_lens, block_table, block_table.stride(0),
        tables.blocks, tables.blocks.stride(0), tables.num_blocks, tables.first_block,
        tables.counts, tables.starts, tables.layer_base,
        pages, pages.stride(0), lengths,
        layer, g.block_stride,
        LAYERS=g.num_layers, HEADS=g.num_kv_heads, PAGE=g.page_size, COLUMNS=256, num_warps=2,
    )  # fmt: skip
