"""FlexPrefill."""

from __future__ import annotations

import torch
from pydantic import Field

from attention_plugins.prefill.base import Chunk, Pattern, PatternArgs, Plan
from attention_plugins.prefill.grid import ROWS
from attention_plugins.prefill.scores import block_sums, logits

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

    Formula:
        D = sqrt(JS(softmax(mean q * mean k / sqrt d), sums of softmax(q k / sqrt d))); columns and diagonals with 1 +
        #(sorted sums <= gamma) tokens.
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
        ops = chunk.ops
        # Together, so that one look at all of them does.
        sums = ops.last_row_sums(chunk, ROWS) / min(ROWS, chunk.q_len)
        floor = -(-self.args.min_budget // BLOCK)
        blocks = (ops.count_to_reach(sums, self.args.gamma) // BLOCK + 1).clamp(min=floor)
        if not self.args.tau:
            columns, diagonals = ops.top(block_sums(sums, BLOCK), blocks)
            return ops.block_stripes(chunk, columns, diagonals)
        keys = ops.pooled_keys(chunk, BLOCK)
        by_means = self.predicted(chunk, sums[0], keys) < self.args.tau
        columns, diagonals = ops.top(block_sums(sums, BLOCK), blocks.masked_fill(by_means[:, None], floor))
        # A row whose keys are all NaN has no softmax to sum: `cover` then takes all of it.
        spread = ops.block_logits(chunk, BLOCK, keys).softmax(-1)
        chosen = ops.cover(spread, self.args.gamma) & by_means[:, None, None]
        return ops.block_stripes(chunk, columns, diagonals, chosen)

    def predicted(self, chunk: Chunk, columns: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """How far the last rows' attention is from what means predict: float32 [num_heads].

        Args:
            columns: [num_heads, k_len].
            keys: mean keys, [num_kv_heads, k_blocks, head_dim].
        """
        query = chunk.queries[-ROWS:].float().mean(0, keepdim=True)
        guess = logits(query, keys, chunk.scale)[:, 0].softmax(-1)
        return distance(guess, block_sums(columns, BLOCK))


def distance(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Root of the Jensen-Shannon divergence, natural logarithm: [..., n] twice -> [...]. Shares of 0 are allowed."""
    middle = (p + q) / 2
    nats = torch.xlogy(p, p) + torch.xlogy(q, q) - torch.xlogy(p + q, middle)
    return (nats.sum(-1) / 2).clamp(min=0).sqrt()
