"""FlexPrefill."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field

from attention_plugins.prefill.base import Chunk, Pattern, PatternArgs, Plan
from attention_plugins.prefill.choose import count_to_reach, cover, top
from attention_plugins.prefill.grid import ROWS
from attention_plugins.prefill.scores import block_logits, block_sums, last_row_sums, logits, pooled_keys

BLOCK = 128


class FlexPrefill(Pattern):
    """Every head chooses for itself, by its last 128 queries, between columns with diagonals and blocks by their means.

    The last queries' attention gives scores to columns and diagonals of 128 tokens; as many are computed as their
    shares `gamma` ask for. Heads whose mean query and mean keys predict that attention well (distance below `tau`)
    compute the least of those, and for each block of queries the blocks of keys that hold `gamma` of its mean attention
    besides.

    Other than in the paper's code: counts never exceed what there is; shares of 0 have a distance (it is NaN there); a
    head with scores that aren't numbers computes everything; each block of queries reaches `gamma` by itself, where the
    code ranks the blocks of all rows together, which starves late rows whose attention is spread; and a block's size
    isn't taken for 128 wherever it is another.

    Chunks: the last queries are each chunk's own. The paper decides once, by the end of the prompt; here early queries
    get a mask that fits them, and the mask depends on where the prompt was cut. A last chunk of few tokens decides by
    those.

    Formula: `D = sqrt(JS(softmax(mean q * mean k / sqrt d), sums of softmax(q k / sqrt d)))`; columns and diagonals
    with `1 + #(sorted sums <= gamma)` tokens.
    """

    name = "flexprefill"
    title = "FlexPrefill: each head chooses its pattern"
    paper = "arXiv 2502.20766"

    class Args(PatternArgs):
        gamma: float = Field(0.95, gt=0, le=1, description="Share of the attention that is computed.")
        tau: float = Field(0.1, ge=0, le=1, description="Distance below which a head goes by mean keys; 0: never.")
        min_budget: int = Field(1024, ge=1, description="Least tokens of columns, and of diagonals.")

    args: Args

    def plan(self, chunk: Chunk) -> Plan:
        grid = chunk.grid
        columns, diagonals = (sums / min(ROWS, chunk.q_len) for sums in last_row_sums(chunk, ROWS))
        by_means = self.predicted(chunk, columns) < self.args.tau
        floor = -(-self.args.min_budget // BLOCK)

        def largest(scores: torch.Tensor) -> torch.Tensor:
            blocks = count_to_reach(scores, self.args.gamma) // BLOCK + 1
            return top(block_sums(scores, BLOCK), blocks.clamp(min=floor).masked_fill(by_means[:, None], floor))

        mask = grid.from_blocks(largest(columns), BLOCK)[:, None] | along(chunk, largest(diagonals))
        # A row whose keys are all NaN has no softmax to sum: `cover` then takes all of it.
        spread = block_logits(chunk, BLOCK).softmax(-1)
        mask |= grid.from_blocks(cover(spread, self.args.gamma), BLOCK) & by_means[:, None, None]
        return Plan.forced(mask, grid)

    def predicted(self, chunk: Chunk, columns: torch.Tensor) -> torch.Tensor:
        """How far the last rows' attention is from what means predict: [num_heads, k_len] -> float32 [num_heads]."""
        query = chunk.queries[-ROWS:].float().mean(0, keepdim=True)
        guess = logits(query, pooled_keys(chunk, BLOCK), chunk.scale)[:, 0].softmax(-1)
        return distance(guess, block_sums(columns, BLOCK))


def distance(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Root of the Jensen-Shannon divergence, natural logarithm: [..., n] twice -> [...]. Shares of 0 are allowed."""
    middle = (p + q) / 2
    nats = torch.xlogy(p, p) + torch.xlogy(q, q) - torch.xlogy(p + q, middle)
    return (nats.sum(-1) / 2).clamp(min=0).sqrt()


def along(chunk: Chunk, chosen: torch.Tensor) -> torch.Tensor:
    """Diagonals of blocks. Diagonal 0 is a block of queries with its own tokens, diagonal 1 with the 128 before.

    Args:
        chosen: bool [num_heads, k_blocks].

    Returns:
        bool [num_heads, q_blocks, k_units]: units that a chosen diagonal touches.
    """
    grid = chunk.grid
    starts = grid.first_rows[:, None] + BLOCK - 1 - grid.unit_starts
    chosen = F.pad(chosen, (0, 1))
    spans = [(starts - shift).div(BLOCK, rounding_mode="floor") for shift in (0, grid.unit - 1)]
    return chosen[:, spans[0].clamp(min=-1)] | chosen[:, spans[1].clamp(min=-1)]
