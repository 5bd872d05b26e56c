"""`attention_plugins.prefill.reach` as two kernels: one runs over near keys like attention, but keeps maxima only; the
other over all keys, with mean queries."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attention_plugins.kernels.prefill.keys import fitting, load_keys, load_rows, paged
from attention_plugins.kernels.prefill.pools import pooled_queries
from attention_plugins.prefill.base import Chunk
from attention_plugins.prefill.grid import ROWS

MAXIMA: dict[str, Any] = {"KEYS": 64, "num_warps": 4, "num_stages": 3}
SLACK: dict[str, Any] = {"KEYS": 128, "BLOCKS": 16, "num_warps": 4, "num_stages": 2}
_VARYING = ["stride", "width", "q_len", "k_len", "span", "q_blocks", "groups", "k_units"]


@triton.jit(do_not_specialize=_VARYING)
def _near_maxima(
    queries, stride, pages, table, width, anchors, q_len, k_len, span, q_blocks, scale,
    GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    member, block, key_head = tl.program_id(0), q_blocks - 1 - tl.program_id(1), tl.program_id(2)
    head = key_head * GROUP + member
    number = block * ROWS + tl.arange(0, ROWS)
    real = number < q_len
    q = load_rows(queries, stride, number, head, real, DIM, DIM_2)
    of = table + key_head.to(tl.int64) * width
    first_row = k_len - q_len + block * ROWS
    start, end = first_row // span * span, tl.minimum(first_row + ROWS, k_len)
    # Where there are keys between the sink and near ones, all rows see the whole sink.
    sinks = tl.where(start > 0, ROWS // KEYS, 0)
    clean = sinks + (first_row + 1 - start) // KEYS
    most = tl.full([ROWS, KEYS], float("-inf"), tl.float32)
    for step in range(0, clean):
        first = tl.where(step < sinks, step * KEYS, start + (step - sinks) * KEYS)
        position = first + tl.arange(0, KEYS)
        k = load_keys(pages, of, position, position < end, PAGE, DIM, DIM_2).to(q.dtype)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        most = tl.maximum(most, products, propagate_nan=tl.PropagateNan.ALL)
    for first in range(start + (clean - sinks) * KEYS, end, KEYS):
        position = first + tl.arange(0, KEYS)
        k = load_keys(pages, of, position, position < end, PAGE, DIM, DIM_2).to(q.dtype)
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        seen = position[None, :] <= (k_len - q_len + number)[:, None]
        most = tl.maximum(most, tl.where(seen, products, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    spoilt = most != most
    row = tl.max(tl.where(spoilt, float("-inf"), most), 1)
    row = tl.where(tl.max(spoilt.to(tl.int32), 1) > 0, float("nan"), row)
    anchor = tl.sum(tl.where(real, row * scale, 0.0), 0) / tl.minimum(q_len - block * ROWS, ROWS)
    tl.store(anchors + head * q_blocks + block, anchor)


@triton.jit(do_not_specialize=_VARYING)
def _group_slack(
    means, anchors, pages, table, width, slack, q_len, k_len, span, q_blocks, groups, k_units, scale,
    GROUP: tl.constexpr, GROUP_2: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCKS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Keys stay, mean queries come: those of some blocks and of all heads that share the keys."""
    tile, head = tl.program_id(0), tl.program_id(1)
    position = tile * KEYS + tl.arange(0, KEYS)
    there = position < k_len
    unit = tile * (KEYS // UNIT) + tl.arange(0, KEYS // UNIT)
    k = load_keys(pages, table + head.to(tl.int64) * width, position, there, PAGE, DIM, DIM_2)
    k = k.to(means.dtype.element_ty)
    place, members = tl.arange(0, GROUP_2 * BLOCKS), tl.arange(0, GROUP_2)
    member, offset = place // BLOCKS, k_len - q_len
    for group in range(0, groups):
        start = (offset // span + group) * span
        # Up to the block that holds the first row of the next group.
        first = tl.maximum((start - offset + ROWS - 1) // ROWS, 0)
        last = tl.minimum((start + span - offset + ROWS - 1) // ROWS, q_blocks)
        most = tl.full([KEYS // UNIT, GROUP_2], float("-inf"), tl.float32)
        if tile * KEYS < start:
            for begin in range(first, last, BLOCKS):
                block = begin + place % BLOCKS
                real = (block < last) & (member < GROUP)
                q = load_rows(means, GROUP * tl.num_programs(1) * DIM, block, head * GROUP + member, real, DIM, DIM_2)
                anchor = tl.load(anchors + (head * GROUP + member) * q_blocks + block, mask=real, other=float("inf"))
                above = tl.dot(k, tl.trans(q), input_precision="ieee") * scale - anchor[None, :]
                above = tl.where(above != above, float("inf"), above)
                above = tl.max(tl.reshape(above, [KEYS, GROUP_2, BLOCKS]), 2)
                above = tl.where(there[:, None], above, float("-inf"))
                most = tl.maximum(most, tl.max(tl.reshape(above, [KEYS // UNIT, UNIT, GROUP_2]), 1))
        before = (unit + 1) * UNIT <= start
        line = ((head * GROUP + members) * groups + group).to(tl.int64) * k_units
        tl.store(
            slack + line[None, :] + unit[:, None], tl.where(before[:, None], most, float("-inf")),
            mask=(unit < k_units)[:, None] & (members < GROUP)[None, :],
        )  # fmt: skip


def near_maxima(chunk: Chunk, span: int) -> torch.Tensor:
    """See `attention_plugins.prefill.reach.near_maxima`."""
    given, blocks = paged(chunk), chunk.grid.q_blocks
    kv_heads, group = given.heads
    anchors = torch.empty(chunk.num_heads, blocks, device=given.queries.device)
    _near_maxima[(group, blocks, kv_heads)](
        given.queries, given.queries.stride(0), given.pages, given.table, given.table.stride(0), anchors,
        chunk.q_len, chunk.k_len, span, blocks, chunk.scale * given.key_scale, **given.shape, ROWS=ROWS,
        **fitting(MAXIMA, given.queries),
    )  # fmt: skip
    return anchors


def group_slack(chunk: Chunk, anchors: torch.Tensor, span: int) -> torch.Tensor:
    """See `attention_plugins.prefill.reach.group_slack`. Mean queries are rounded to the queries' dtype."""
    given, grid = paged(chunk), chunk.grid
    groups = (grid.offset + (grid.q_blocks - 1) * ROWS) // span - grid.offset // span + 1
    means = pooled_queries(chunk).to(given.queries.dtype)
    slack = torch.empty(chunk.num_heads, groups, grid.k_units, device=means.device)
    sizes = fitting(SLACK, given.queries)
    _group_slack[(triton.cdiv(grid.k_len, sizes["KEYS"]), given.heads[0])](
        means, anchors.contiguous(), given.pages, given.table, given.table.stride(0), slack, grid.q_len, grid.k_len,
        span, grid.q_blocks, groups, grid.k_units, chunk.scale * given.key_scale,
        **given.shape, GROUP_2=triton.next_power_of_2(given.heads[1]), ROWS=ROWS, UNIT=grid.unit, **sizes,
    )  # fmt: skip
    return slack
