"""A layer's page tables as kernels read them: what a row's length is, and which page is whose."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attention_plugins.decode.rows import DecodeRows, LayerCache
from kvcache.pages import InterleavedCodec
from kvcache.tables import PageTables

Table = tuple[Any, ...]
"""One argument of a kernel: `pack_table`'s tensors and strides."""

VARYING = ["layer", "want"]
"""Arguments that are no compile-time constants: another layer must not wait for a compiler."""


def pack_table(tables: PageTables, slots: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor) -> Table:
    """What `open_row` and `page_at` take; the arguments are those of `attention_plugins.page_rows.page_rows`."""
    return (
        slots, seq_lens, block_table, block_table.stride(0),
        tables.blocks, tables.blocks.stride(0), tables.num_blocks, tables.first_block,
        tables.counts, tables.starts, tables.layer_base, tables.geometry.block_stride,
    )  # fmt: skip


def table_of(rows: DecodeRows) -> Table:
    return pack_table(rows.tables, rows.slots, rows.seq_lens, rows.block_table)


def table_shape(rows: DecodeRows) -> dict[str, int]:
    """The compile-time constants that go with a table."""
    geometry = rows.tables.geometry
    return {"LAYERS": geometry.num_layers, "HEADS": geometry.num_kv_heads, "PAGE": geometry.page_size}


def most_tokens(rows: DecodeRows) -> int:
    """No row is longer: vLLM's block table has no more room. A grid's size comes from this, never from data."""
    return rows.block_table.shape[1] * rows.tables.geometry.page_size


def contents_of(cache: LayerCache) -> torch.Tensor:
    """The cache's pages, fp8 typed as such.

    Raises:
        ValueError: the cache isn't laid out token by token.
    """
    if not isinstance(cache.codec, InterleavedCodec):
        raise ValueError(f"the kernels read an InterleavedCodec's pages, not {type(cache.codec).__name__}'s")
    return cache.pages.view(torch.float8_e4m3fn) if cache.pages.element_size() == 1 else cache.pages


def typed_queries(cache: LayerCache, queries: torch.Tensor) -> tuple[torch.Tensor, float, dict[str, Any]]:
    """Queries as kernels read them, [n, num_kv_heads, group, dim] with gaps between the rows at most; what they are to
    be multiplied with; compile-time constants."""
    factor = 1.0
    if queries.element_size() == 1:
        queries, factor = queries.view(torch.float8_e4m3fn), cache.quant.query
    group, dim = queries.shape[2:]
    if queries.stride()[1:] != (group * dim, dim, 1):
        queries = queries.contiguous()
    shape = {
        "GROUP": group,
        "GROUP_2": max(16, triton.next_power_of_2(group)),  # tl.dot's least
        "DIM": dim,
        "DIM_2": max(16, triton.next_power_of_2(dim)),
        "FP8": queries.element_size() == 1,
    }
    return queries, factor, shape


@triton.jit
def load_queries(
    queries, queries_stride, request, head,
    GROUP: tl.constexpr, GROUP_2: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """A group's queries: [GROUP_2, DIM_2], zeros beyond both ends; fp8 ones as bfloat16, which holds them exactly."""
    member, dim = tl.arange(0, GROUP_2), tl.arange(0, DIM_2)
    at = queries + request.to(tl.int64) * queries_stride + head * GROUP * DIM
    there = (member[:, None] < GROUP) & (dim < DIM)
    q = tl.load(at + member[:, None] * DIM + dim, mask=there, other=0.0)
    if FP8:
        q = q.to(tl.bfloat16)
    return q


@triton.jit
def open_row(table, layer, request, head, LAYERS: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr):
    """A row's length (0 for no request), and what `page_at` needs."""
    slots, seq_lens, _, _, _, _, num_blocks, first_block, counts, starts, layer_base, _ = table
    slot = tl.load(slots + request)
    here = slot >= 0
    slot = tl.maximum(slot, 0).to(tl.int64)
    place = (slot * LAYERS + layer) * HEADS + head
    count, start = tl.load(counts + place), tl.load(starts + place)
    n, first = tl.load(num_blocks + slot), tl.load(first_block + slot)
    tail = tl.load(seq_lens + request) - first * PAGE
    length = tl.where(here, count * PAGE + tail, 0)
    return length, (request, head, slot, count, start, n, first, tl.load(layer_base + layer))


@triton.jit
def page_at(table, row, number, there, HEADS: tl.constexpr):
    """Pages of these numbers of a row: int32, any shape; any page where it isn't there."""
    _, _, block_table, block_table_stride, blocks, blocks_stride, _, _, _, _, layer_base, block_stride = table
    request, head, slot, count, start, n, first, own_base = row
    kept = there & (number < count)
    index = start + number
    base = tl.load(layer_base + index // (n * HEADS), mask=kept, other=0)
    block = tl.load(blocks + slot * blocks_stride + index % n, mask=kept, other=0)
    page = base + block * block_stride + index // n % HEADS
    new = there & (number >= count)
    later = first + number - count
    block = tl.load(block_table + request.to(tl.int64) * block_table_stride + later, mask=new, other=0)
    return tl.where(number < count, page, own_base + block * block_stride + head)


@triton.jit
def slot_at(table, row, place, there, HEADS: tl.constexpr, PAGE: tl.constexpr):
    """Slots of these places of a row: int64, any shape."""
    return page_at(table, row, place // PAGE, there, HEADS).to(tl.int64) * PAGE + place % PAGE


@triton.jit
def nan_first(scores):
    """Infinity instead of NaN."""
    return tl.where(scores != scores, float("inf"), scores)
