"""MInference 1.0."""

from __future__ import annotations

from enum import IntEnum

import torch
from pydantic import Field

from attention_plugins.prefill.base import Chunk, Pattern, PatternArgs, Plan
from kvcache.tables import to_device

LAST = 64
"""Queries that columns and diagonals are chosen by."""
FORCED = 30
"""First columns and last diagonals, which are always chosen."""
LEAST_DIAGONALS = 50
BLOCK = 64
TABLE = "minference.heads"
"""Name of the calibration: int64 [num_layers, num_heads, 3], kind and two sizes."""


class Kind(IntEnum):
    """What a head computes, and what its two sizes mean."""

    VERTICAL_SLASH = 0
    """So many columns, so many diagonals."""
    A_SHAPE = 1
    """So many first tokens, so many last."""
    BLOCK_SPARSE = 2
    """So many blocks of 64 keys for each block of queries; the second size means nothing."""


class MInference(Pattern):
    """Every head has a pattern of its own, found offline; which columns, diagonals or blocks is decided by the prompt.

    Columns and diagonals are those that the last 64 queries attend to most (the first 30 columns and the last 30
    diagonals always); blocks are those whose mean key goes best with a block's mean query. The heads' kinds and sizes
    come from `longreach calibrate` (`attention_plugins.prefill.minference_search`); without it every head takes
    `vertical` columns and `slash` diagonals, as in the paper's code for heads that its tables lack. Such tables aren't
    shipped.

    Columns and diagonals are rounded to units of the cache for blocks of 128 queries (64 in the paper's code, which
    gathers single columns): this computes more, and nothing less. Mean queries are of 128 too.

    Chunks: the last queries are each chunk's own, so the mask depends on where the prompt was cut. The table is read on
    the CPU, the numbers in it go to the GPU with each plan.

    Formula:
        A = softmax(Q_last64 K^T / sqrt d); columns by sum_i A_ij, diagonals by sum_i A_i,i-o.
    """

    name = "minference"
    title = "MInference: a pattern for each head, found offline"
    paper = "arXiv 2407.02490"
    needs_calibration = True

    class Args(PatternArgs):
        vertical: int = Field(1000, ge=FORCED, description="Columns of heads that weren't calibrated.")
        slash: int = Field(6096, ge=LEAST_DIAGONALS, description="Diagonals of heads that weren't calibrated.")

    args: Args

    def plan(self, chunk: Chunk) -> Plan:
        if TABLE in chunk.calibration:
            return plan_heads(chunk, chunk.calibration[TABLE][chunk.layer])
        return vertical_slash(chunk, self.args.vertical, self.args.slash)


def plan_heads(chunk: Chunk, table: torch.Tensor) -> Plan:
    """The plan of heads with these kinds and sizes, int64 [num_heads, 3] on the CPU. Too few columns or
    diagonals become the fewest there can be."""
    least = torch.tensor([[Kind.VERTICAL_SLASH, FORCED, LEAST_DIAGONALS]])
    table = torch.where(table[:, :1] == Kind.VERTICAL_SLASH, table.maximum(least), table)
    kinds, first, second = to_device(table, chunk.queries.device).unsqueeze(-1).unbind(1)
    mask = chunk.grid.always
    for kind in sorted(set(table[:, 0].tolist())):
        mask = torch.where((kinds == kind)[..., None], PLANS[Kind(kind)](chunk, first, second).mask, mask)
    return Plan.forced(mask, chunk.grid)


def vertical_slash(chunk: Chunk, columns: torch.Tensor | int, diagonals: torch.Tensor | int) -> Plan:
    """Columns and diagonals by the last queries.

    Args:
        columns, diagonals: how many; int64 [num_heads, 1] for each head's own.
    """
    sums = chunk.ops.last_row_sums(chunk, LAST)
    sums[..., :FORCED] = float("inf")
    counts = torch.empty(2, chunk.num_heads, 1, dtype=torch.int64, device=sums.device)
    counts[0], counts[1] = columns, diagonals
    return chunk.ops.token_stripes(chunk, *chunk.ops.top(sums, counts))


def a_shape(chunk: Chunk, sinks: torch.Tensor, window: torch.Tensor) -> Plan:
    """First and last tokens."""
    positions = torch.arange(chunk.k_len, device=sinks.device)
    return chunk.ops.token_stripes(chunk, positions < sinks, positions < window)


def block_sparse(chunk: Chunk, blocks: torch.Tensor, _: torch.Tensor) -> Plan:
    """Blocks of keys by their means."""
    return chunk.ops.block_plan(chunk, chunk.ops.top(chunk.ops.block_logits(chunk, BLOCK), blocks[..., None]), BLOCK)


PLANS = {Kind.VERTICAL_SLASH: vertical_slash, Kind.A_SHAPE: a_shape, Kind.BLOCK_SPARSE: block_sparse}
