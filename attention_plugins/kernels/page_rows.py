"""`attention_plugins.page_rows.page_rows` as one launch per layer, for CUDA graphs: no shape depends on the data."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attention_plugins.decode.rows import DecodeRows, LayerCache
from attention_plugins.kernels.tables import VARYING, Table, open_row, pack_table, page_at, table_of
from kvcache.pages import PageGeometry
from kvcache.tables import PageTables

_COLUMNS = 1024


@triton.jit(do_not_specialize=VARYING)
def _page_rows(
    table, layer, modes, want, pages, pages_stride, lengths,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    request, head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length, row = open_row(table, layer, request, head, LAYERS, HEADS, PAGE)
    if modes is not None:
        length = tl.where((tl.load(modes + request) & want) != 0, length, 0)
    at = request * HEADS + head
    if chunk == 0:
        tl.store(lengths + at, length)
    total = (length + PAGE - 1) // PAGE
    if chunk * COLUMNS >= total:
        return
    column = chunk * COLUMNS + tl.arange(0, COLUMNS)
    page = page_at(table, row, column, column < total, HEADS)
    tl.store(pages + at.to(tl.int64) * pages_stride + column, page, mask=column < total)


def _launch(
    pages: torch.Tensor, lengths: torch.Tensor, table: Table, g: PageGeometry, n: int, layer: int, modes: Any, want: int
) -> None:
    _page_rows[(n, g.num_kv_heads, triton.cdiv(pages.shape[1], _COLUMNS))](
        table, layer, modes, want, pages, pages.stride(0), lengths,
        LAYERS=g.num_layers, HEADS=g.num_kv_heads, PAGE=g.page_size, COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip


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
    table = pack_table(tables, slots, seq_lens, block_table)
    _launch(pages, lengths, table, tables.geometry, len(slots), layer, None, 0)


def full_rows(
    pages_out: torch.Tensor, lengths_out: torch.Tensor, rows: DecodeRows, cache: LayerCache, want: int
) -> None:
    """See `attention_plugins.naive.full_rows`."""
    _launch(pages_out, lengths_out, table_of(rows), rows.tables.geometry, len(rows), cache.layer, rows.modes, int(want))
