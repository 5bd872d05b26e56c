"""How near units of keys come to what queries see of the sink and of near tokens: AnchorAttention's estimates.

Groups are blocks of queries whose first rows lie in the same `span` tokens of the prompt; a group's near tokens are
those from the start of these on.
"""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F

from attention_plugins.prefill.base import TILE, Chunk, read
from attention_plugins.prefill.grid import ROWS, Grid
from attention_plugins.prefill.scores import block_sums, logits


def groups(grid: Grid, span: int) -> list[tuple[int, int]]:
    """Ranges of blocks of queries that form groups; `span` is a multiple of 128."""
    found = groupby(range(grid.q_blocks), lambda block: (grid.offset + block * ROWS) // span)
    return [(blocks[0], blocks[-1] + 1) for blocks in (list(group) for _, group in found)]


def near_maxima(chunk: Chunk, span: int) -> torch.Tensor:
    """Mean over each block's rows of their largest logit among the first 128 keys and the near ones.

    Returns:
        float32 [num_heads, q_blocks]; NaN where some seen logit is.
    """
    grid = chunk.grid
    sink = read(chunk.keys, 0, min(ROWS, chunk.k_len))
    maxima = []
    for block, end in groups(grid, span):
        queries = chunk.queries[block * ROWS : end * ROWS]
        first = grid.offset + block * ROWS
        start, stop = first // span * span, first + len(queries)
        keys = torch.cat([sink, read(chunk.keys, start, stop)], 1)
        positions = torch.arange(stop, device=grid.device)
        seen = torch.cat([positions[: sink.shape[1]], positions[start:]]) <= positions[first:, None]
        maxima.append(logits(queries, keys, chunk.scale).masked_fill_(~seen, float("-inf")).amax(-1))
    return block_sums(torch.cat(maxima, -1), ROWS) / (grid.last_rows - grid.first_rows + 1)


def group_slack(chunk: Chunk, anchors: torch.Tensor, span: int) -> torch.Tensor:
    """Largest logit of each unit's keys with the mean queries of a group's blocks, each less its block's anchor.

    Args:
        anchors: float32 [num_heads, q_blocks].

    Returns:
        float32 [num_heads, groups, k_units]; -inf for units that hold near tokens, infinity where some logit or anchor
        is NaN.
    """
    grid, queries, ranges = chunk.grid, chunk.ops.pooled_queries(chunk), groups(chunk.grid, span)
    found = []
    for _, keys in chunk.tiles(TILE):
        above = logits(queries, keys, chunk.scale) - anchors[..., None]
        padded = F.pad(above, (0, -above.shape[-1] % grid.unit), value=float("-inf"))
        units = padded.unflatten(-1, (-1, grid.unit)).amax(-1)
        found.append(torch.stack([units[:, first:last].amax(1) for first, last in ranges], 1))
    slack = torch.cat(found, -1)
    near = near_units(grid, span)[[first for first, _ in ranges]]
    return slack.masked_fill_(slack.isnan(), float("inf")).masked_fill_(near, float("-inf"))


def near_units(grid: Grid, span: int) -> torch.Tensor:
    """Units that hold near tokens, or later ones: bool [q_blocks, k_units]."""
    return grid.unit_starts + grid.unit > (grid.first_rows // span * span)[:, None]
