"""XAttention."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from attention_plugins.prefill.base import TILE, Chunk, Pattern, PatternArgs, Plan
from attention_plugins.prefill.choose import cover
from attention_plugins.prefill.grid import ROWS
from attention_plugins.prefill.scores import logits

BLOCK = 128
SLAB = 8
"""Blocks of queries that are scored together: bounds the memory of their tiles."""


class XAttention(Pattern):
    """Scores blocks by the sums of their antidiagonals, and computes the largest that hold `threshold` of a row's mass.

    A block is cut into tiles of `stride` by `stride` tokens, and of each tile the mean logit of its antidiagonal is
    computed: every key and every query of the tile takes part once. Softmax over the tiles of a row, sums over blocks
    of 128 by 128. As published, tiles on the diagonal count pairs above it too. The sink and the diagonal are counted
    first. Rows and keys that fill no tile are averaged over the pairs there are, where the paper's code pads with
    zeros. One threshold for all heads; the paper's tables of thresholds per head are not read.

    Chunks: rows are scored by themselves, so the mask doesn't depend on chunks whose length is a multiple of 128.

    Formula: `mass_ij = sum over tiles of block (i, j) of softmax_c(mean_t q_{r,S-1-t} k_{c,t} / sqrt d)`.
    """

    name = "xattention"
    title = "XAttention: blocks by their antidiagonals"
    paper = "arXiv 2503.16428"
    chunk_exact = True

    class Args(PatternArgs):
        stride: Literal[4, 8, 16] = Field(8, description="Side of a tile; the estimate costs 1/stride of QK.")
        threshold: float = Field(0.9, gt=0, le=1, description="Share of each row's estimated mass that is computed.")

    args: Args

    def plan(self, chunk: Chunk) -> Plan:
        grid, device = chunk.grid, chunk.queries.device
        blocks = torch.arange(grid.k_blocks(BLOCK), device=device)
        own = (blocks >= grid.first_rows[:, None] // BLOCK) & (blocks <= grid.last_rows[:, None] // BLOCK)
        chosen = cover(self.masses(chunk), self.args.threshold, first=own | (blocks == 0))
        return Plan.forced(grid.from_blocks(chosen, BLOCK), grid)

    def masses(self, chunk: Chunk) -> torch.Tensor:
        """Estimated attention of every block: float32 [num_heads, q_blocks, k_blocks]; rows sum to their tiles."""
        stride = self.args.stride
        queries = tiled(chunk.queries.transpose(0, 1).flip(1), stride, front=True).flip(1)
        tiles = [tiled(keys, stride) for _, keys in chunk.tiles(TILE)]
        slab = SLAB * ROWS // stride
        found = []
        for first in range(0, queries.shape[1], slab):
            rows = queries[:, first : first + slab].transpose(0, 1)
            means = torch.cat([logits(rows, keys, chunk.scale / stride) for keys in tiles], -1)
            row = torch.arange(first, first + len(rows), device=means.device) * stride
            column = torch.arange(means.shape[-1], device=means.device) * stride
            means *= stride / pairs(chunk, row[:, None], column, stride)
            above = column >= chunk.offset + row[:, None] + stride
            shares = means.masked_fill_(above, float("-inf")).softmax(-1)
            shares *= (chunk.q_len - row).clamp(max=stride)[:, None] / stride
            found.append(tile_sums(shares, ROWS // stride, BLOCK // stride))
        return torch.cat(found, 1)


def tiled(vectors: torch.Tensor, stride: int, front: bool = False) -> torch.Tensor:
    """So many vectors one behind the other: [heads, n, d] -> [heads, ceil(n / stride), stride * d], padded by zeros."""
    missing = -vectors.shape[1] % stride
    padded = F.pad(vectors, (0, 0, missing, 0) if front else (0, 0, 0, missing))
    return padded.unflatten(1, (-1, stride)).flatten(2)


def pairs(chunk: Chunk, row: torch.Tensor, column: torch.Tensor, stride: int) -> torch.Tensor:
    """Pairs on the antidiagonal of tiles that start at these row and key; 1 where there are none, whose sum is 0."""
    rows, keys = (chunk.q_len - row).clamp(max=stride), (chunk.k_len - column).clamp(max=stride)
    return (rows + keys - stride).clamp(min=1)


def tile_sums(shares: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Sums over blocks of tiles: [heads, m, n] -> [heads, ceil(m / rows), ceil(n / columns)]."""
    padded = F.pad(shares, (0, -shares.shape[2] % columns, 0, -shares.shape[1] % rows))
    return padded.unflatten(2, (-1, columns)).sum(-1).unflatten(1, (-1, rows)).sum(2)
