"""XAttention."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from attention_plugins.prefill.base import Chunk, Pattern, PatternArgs, Plan

BLOCK = 128


class XAttention(Pattern):
    """Scores blocks by the sums of their antidiagonals, and computes the largest that hold `threshold` of a row's mass.

    A block is cut into tiles of `stride` by `stride` tokens, and of each tile the mean logit of its antidiagonal is
    computed: every key and every query of the tile takes part once. Softmax over the tiles of a row, sums over blocks
    of 128 by 128. As published, tiles on the diagonal count pairs above it too. The sink and the diagonal are counted
    first. Rows and keys that fill no tile are averaged over the pairs there are, where the paper's code pads with
    zeros. One threshold for all heads; the paper's tables of thresholds per head are not read.

    Chunks: rows are scored by themselves, so the mask doesn't depend on chunks whose length is a multiple of 128.

    Formula:
        mass_ij = sum over tiles of block (i, j) of softmax_c(mean_t q_{r,S-1-t} k_{c,t} / sqrt d).
    """

    name = "xattention"
    title = "XAttention: blocks by their antidiagonals"
    paper = "arXiv 2503.16428"
    chunk_exact = True

    class Args(PatternArgs):
        stride: Literal[4, 8, 16, 32, 64, 128] = Field(
            8, description="Side of a tile; the estimate costs 1/stride of QK."
        )
        threshold: float = Field(0.9, gt=0, le=1, description="Share of each row's estimated mass that is computed.")

    args: Args

    def plan(self, chunk: Chunk) -> Plan:
        masses = chunk.ops.antidiagonal_masses(chunk, self.args.stride)
        chosen = chunk.ops.cover(masses, self.args.threshold, first=chunk.grid.always_blocks)
        return chunk.ops.block_plan(chunk, chosen, BLOCK)
