"""From chosen blocks, columns and diagonals to plans."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attention_plugins.prefill.base import Chunk, Plan
from attention_plugins.prefill.grid import ROWS
from attention_plugins.prefill.reach import near_units


def block_plan(chunk: Chunk, chosen: torch.Tensor, block: int) -> Plan:
    """The plan of chosen blocks of keys: bool [heads, q_blocks, k_blocks(block)], blocks of `block` keys."""
    return Plan.forced(chunk.grid.from_blocks(chosen, block), chunk.grid)


def block_stripes(
    chunk: Chunk, columns: torch.Tensor, diagonals: torch.Tensor, blocks: torch.Tensor | None = None
) -> Plan:
    """The plan of columns and diagonals of 128 tokens, and single blocks.

    Args:
        columns, diagonals: bool [heads, k_blocks], diagonals as `along` counts them.
        blocks: bool [heads, q_blocks, k_blocks].
    """
    grid = chunk.grid
    mask = grid.from_blocks(columns, ROWS)[:, None] | along(chunk, diagonals)
    return Plan.forced(mask if blocks is None else mask | grid.from_blocks(blocks, ROWS), grid)


def token_stripes(chunk: Chunk, columns: torch.Tensor, diagonals: torch.Tensor) -> Plan:
    """The plan of single columns and diagonals: bool [heads, k_len], diagonals by distance back to the key."""
    grid = chunk.grid
    return Plan.forced(grid.from_tokens(columns)[:, None] | grid.from_diagonals(diagonals), grid)


def group_plan(chunk: Chunk, chosen: torch.Tensor, span: int) -> Plan:
    """The plan of units that groups of blocks share (see `attention_plugins.prefill.reach`), and of near ones.

    Args:
        chosen: bool [heads, groups, k_units].
    """
    grid = chunk.grid
    group = grid.first_rows // span - grid.offset // span
    return Plan.forced(chosen[:, group] | near_units(grid, span), grid)


def along(chunk: Chunk, chosen: torch.Tensor) -> torch.Tensor:
    """Diagonals of blocks. Diagonal 0 is a block of queries with its own tokens, diagonal 1 with the 128 before.

    Args:
        chosen: bool [num_heads, k_blocks].

    Returns:
        bool [num_heads, q_blocks, k_units]: units that a chosen diagonal touches.
    """
    grid = chunk.grid
    starts = grid.first_rows[:, None] + ROWS - 1 - grid.unit_starts
    chosen = F.pad(chosen, (0, 1))
    spans = [(starts - shift).div(ROWS, rounding_mode="floor") for shift in (0, grid.unit - 1)]
    return chosen[:, spans[0].clamp(min=-1)] | chosen[:, spans[1].clamp(min=-1)]
