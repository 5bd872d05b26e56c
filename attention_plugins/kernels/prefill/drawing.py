"""`attention_plugins.prefill.drawing` in one launch: a mask is written once, with all that every plan has."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention_plugins.prefill.base import Chunk, Plan
from attention_plugins.prefill.grid import ROWS

_UNITS = 1024
_VARYING = ["mask_head", "q_blocks", "q_len", "k_len", "k_units", "blocks_head", "k_blocks", "windows_head"]
_VARYING += ["windows_short", "groups", "span", "width", "remainder", "last_rows"]


@triton.jit(do_not_specialize=_VARYING)
def _draw(
    mask, q_blocks, q_len, k_len, k_units,
    blocks, blocks_head, k_blocks, columns, columns_head, diagonals, diagonals_head,
    windows, windows_head, windows_short, shared, groups, span,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, COLUMN: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    block, head = tl.program_id(1), tl.program_id(2)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    first_row = k_len - q_len + block * ROWS
    last_row = tl.minimum(first_row + ROWS, k_len) - 1
    start = unit * UNIT
    visible = start <= last_row
    found = (start < ROWS) | (start + UNIT > first_row)
    if blocks is not None:
        line = blocks + head.to(tl.int64) * blocks_head + block * k_blocks
        found = found | (tl.load(line + start // BLOCK, mask=visible, other=0) != 0)
        if BLOCK < UNIT:
            for step in tl.static_range(1, UNIT // BLOCK):
                at = start // BLOCK + step
                found = found | (tl.load(line + at, mask=visible & (at < k_blocks), other=0) != 0)
    if columns is not None:
        at = start // COLUMN
        found = found | (tl.load(columns + head.to(tl.int64) * columns_head + at, mask=visible, other=0) != 0)
    if diagonals is not None:
        line = diagonals + head.to(tl.int64) * diagonals_head
        far = first_row + ROWS - 1 - start
        near = far - (UNIT - 1)
        # Rows behind the last one have no distances; the first units, which would see them, are drawn anyway.
        distances = (k_len + ROWS - 1) // ROWS
        found = found | (tl.load(line + far // ROWS, mask=visible & (far // ROWS < distances), other=0) != 0)
        there = (near >= 0) & (near // ROWS < distances)
        found = found | (tl.load(line + near // ROWS, mask=visible & there, other=0) != 0)
    if shared is not None:
        group = first_row // span - (k_len - q_len) // span
        line = shared + (head.to(tl.int64) * groups + group) * k_units
        found = found | (start + UNIT > first_row // span * span)
        found = found | (tl.load(line + unit, mask=visible, other=0) != 0)
    if windows is not None:
        line = windows + head.to(tl.int64) * windows_head
        line += tl.where(block == q_blocks - 1, 1, 0) * windows_short
        found = found | (tl.load(line + (first_row // UNIT - unit + ROWS // UNIT), mask=visible, other=0) != 0)
    out = mask + (head * q_blocks + block).to(tl.int64) * k_units + unit
    tl.store(out, (found & visible).to(tl.uint8), mask=unit < k_units)


@triton.jit(do_not_specialize=_VARYING)
def _windows(
    diagonals, windows, k_len, width, remainder, last_rows, UNIT: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr
):
    """Whether a chosen distance lies between a block of queries and a unit: uint8 [2, heads, width], by how many units
    the unit lies before the one of the block's first row, counted from as many behind it as a block has.

    First for blocks of all their rows, then for the last one. That distance is the same for all, as blocks hold whole
    units: `remainder` is the first rows' place in theirs.
    """
    head, short = tl.program_id(1), tl.program_id(2)
    number, place = tl.program_id(0) * N + tl.arange(0, N), tl.arange(0, 2 * ROWS)
    rows = tl.where(short > 0, last_rows, ROWS)
    distance = ((number - ROWS // UNIT) * UNIT + remainder - (UNIT - 1))[:, None] + place[None, :]
    there = (distance >= 0) & (distance < k_len) & (place < rows + UNIT - 1)[None, :]
    found = tl.load(diagonals + head.to(tl.int64) * k_len + distance, mask=there, other=0)
    out = windows + (short * tl.num_programs(1) + head).to(tl.int64) * width + number
    tl.store(out, tl.max(found.to(tl.int32), 1).to(tl.uint8), mask=number < width)


def _head_stride(flags: torch.Tensor) -> int:
    """From one head to the next; 0 where heads are alike."""
    return flags.stride(0) if len(flags) > 1 else 0


def draw(
    chunk: Chunk,
    heads: int,
    *,
    blocks: torch.Tensor | None = None,
    block: int = ROWS,
    columns: torch.Tensor | None = None,
    column: int = ROWS,
    diagonals: torch.Tensor | None = None,
    windows: torch.Tensor | None = None,
    shared: torch.Tensor | None = None,
    span: int = ROWS,
) -> Plan:
    """All that is given, together.

    Args:
        heads: of the plan.
        blocks: bool [heads or 1, q_blocks, k_blocks(block)].
        columns: bool [heads or 1, k_blocks(column)], `column` is no smaller than a unit.
        diagonals: bool [heads or 1, k_blocks(128)].
        windows: uint8 of `_windows`.
        shared: bool [heads, groups, k_units], of groups of `span` tokens; units from a group's start on are drawn too.
    """
    grid = chunk.grid
    mask = torch.empty(heads, grid.q_blocks, grid.k_units, dtype=torch.uint8, device=chunk.queries.device)
    given = [
        None if flags is None else flags.contiguous().view(torch.uint8)
        for flags in (blocks, columns, diagonals, shared)
    ]
    strides = [0 if flags is None else _head_stride(flags) for flags in given]
    _draw[(triton.cdiv(grid.k_units, _UNITS), grid.q_blocks, heads)](
        mask, grid.q_blocks, grid.q_len, grid.k_len, grid.k_units,
        given[0], strides[0], grid.k_blocks(block), given[1], strides[1], given[2], strides[2],
        windows, 0 if windows is None else _head_stride(windows[0]), 0 if windows is None else windows.stride(0),
        given[3], 0 if shared is None else shared.shape[1], span,
        UNIT=grid.unit, ROWS=ROWS, BLOCK=block, COLUMN=column, UNITS=_UNITS, num_warps=4,
    )  # fmt: skip
    return Plan(mask.view(torch.bool), grid)


def block_plan(chunk: Chunk, chosen: torch.Tensor, block: int) -> Plan:
    """See `attention_plugins.prefill.drawing.block_plan`; powers of two are blocks."""
    return draw(chunk, len(chosen), blocks=chosen, block=block)


def block_stripes(
    chunk: Chunk, columns: torch.Tensor, diagonals: torch.Tensor, blocks: torch.Tensor | None = None
) -> Plan:
    """See `attention_plugins.prefill.drawing.block_stripes`."""
    return draw(chunk, len(columns), blocks=blocks, columns=columns, diagonals=diagonals)


def group_plan(chunk: Chunk, chosen: torch.Tensor, span: int) -> Plan:
    """See `attention_plugins.prefill.drawing.group_plan`."""
    return draw(chunk, len(chosen), shared=chosen, span=span)


def token_stripes(chunk: Chunk, columns: torch.Tensor, diagonals: torch.Tensor) -> Plan:
    """See `attention_plugins.prefill.drawing.token_stripes`."""
    grid = chunk.grid
    diagonals = diagonals.contiguous().view(torch.uint8)
    heads, width = len(diagonals), grid.k_units + ROWS // grid.unit
    windows = torch.empty(2, heads, width, dtype=torch.uint8, device=diagonals.device)
    _windows[(triton.cdiv(width, 64), heads, 2)](
        diagonals, windows, grid.k_len, width, grid.offset % grid.unit, grid.q_len - (grid.q_blocks - 1) * ROWS,
        UNIT=grid.unit, ROWS=ROWS, N=64, num_warps=4,
    )  # fmt: skip
    return draw(chunk, max(len(columns), heads), columns=grid.from_tokens(columns), column=grid.unit, windows=windows)
