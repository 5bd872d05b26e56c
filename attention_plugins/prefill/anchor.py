"""AnchorAttention."""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from pydantic import Field

from attention_plugins.prefill.base import TILE, Chunk, Pattern, PatternArgs, Plan, read
from attention_plugins.prefill.grid import ROWS, Grid
from attention_plugins.prefill.scores import block_sums, logits


class Anchor(Pattern):
    """A key is computed if it comes within `theta` of the largest logit among the sink and the near tokens.

    That largest logit, the anchor, is exact for every query; it is averaged over blocks of 128 queries, as the queries
    are. Of a group of `step` blocks, a key needs to come near one block's anchor to be computed for all of them. Near
    tokens are those from the group's start on. The paper gathers single keys; here the units that hold one are computed
    whole, which computes more, and nothing less.

    `theta` is in natural units: the paper's 12 is log2 in its Triton code, which is 8.3 here, and natural in its torch
    code.

    Chunks: groups are counted from the prompt's start. Chunks that are a multiple of `128 step` tokens long give the
    same mask as the whole prompt; others leave groups open, whose halves then choose for themselves.

    Formula:
        unit u is computed for a group if max over its blocks b, keys j of mean(q_b) k_j / sqrt d + theta >= mean over
        rows of max over sink and near keys of q k / sqrt d.
    """

    name = "anchor"
    title = "AnchorAttention: keys within reach of a row's maximum"
    paper = "arXiv 2505.23520"

    class Args(PatternArgs):
        theta: float = Field(8.3, description="How far below the anchor a logit may be; natural units.")
        step: int = Field(16, ge=1, description="Blocks of 128 queries that share their keys.")

    args: Args

    def plan(self, chunk: Chunk) -> Plan:
        slack = self.slack(chunk)
        shared = [slack[:, first:last].amax(1, keepdim=True).expand(-1, last - first, -1) for first, last in
                  groups(chunk.grid, self.args.step)]  # fmt: skip
        # Not "at least 0", so that NaN is kept.
        reached = ~(torch.cat(shared, 1) + self.args.theta < 0)
        return Plan.forced(reached | self.near(chunk.grid), chunk.grid)

    def near(self, grid: Grid) -> torch.Tensor:
        """Units of the tokens that anchors are taken from, the sink not counted: bool [q_blocks, k_units]."""
        span = self.args.step * ROWS
        return grid.unit_starts + grid.unit > (grid.first_rows // span * span)[:, None]

    def slack(self, chunk: Chunk) -> torch.Tensor:
        """Largest mean logit of each unit, less the anchor: float32 [num_heads, q_blocks, k_units]."""
        queries, anchors, unit = chunk.ops.pooled_queries(chunk), self.anchors(chunk), chunk.unit
        found = []
        for _, keys in chunk.tiles(TILE):
            above = logits(queries, keys, chunk.scale) - anchors[..., None]
            padded = F.pad(above, (0, -above.shape[-1] % unit), value=float("-inf"))
            found.append(padded.unflatten(-1, (-1, unit)).amax(-1))
        return torch.cat(found, -1)

    def anchors(self, chunk: Chunk) -> torch.Tensor:
        """Mean over each block's rows of their largest logit: float32 [num_heads, q_blocks]."""
        grid, span = chunk.grid, self.args.step * ROWS
        sink = read(chunk.keys, 0, min(ROWS, chunk.k_len))
        maxima = []
        for block, end in groups(grid, self.args.step):
            queries = chunk.queries[block * ROWS : end * ROWS]
            first = grid.offset + block * ROWS
            start, stop = first // span * span, first + len(queries)
            keys = torch.cat([sink, read(chunk.keys, start, stop)], 1)
            positions = torch.arange(stop, device=grid.device)
            seen = torch.cat([positions[: sink.shape[1]], positions[start:]]) <= positions[first:, None]
            maxima.append(logits(queries, keys, chunk.scale).masked_fill_(~seen, float("-inf")).amax(-1))
        return block_sums(torch.cat(maxima, -1), ROWS) / (grid.last_rows - grid.first_rows + 1)


def groups(grid: Grid, step: int) -> list[tuple[int, int]]:
    """Ranges of blocks of queries whose first rows lie in the same `step * 128` tokens of the prompt."""
    found = groupby(range(grid.q_blocks), lambda block: (grid.offset + block * ROWS) // (step * ROWS))
    return [(blocks[0], blocks[-1] + 1) for blocks in (list(group) for _, group in found)]
