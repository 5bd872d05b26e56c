"""XAttention's estimate: the attention of blocks, by the antidiagonals of their tiles."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attention_plugins.prefill.base import TILE, Chunk
from attention_plugins.prefill.grid import ROWS
from attention_plugins.prefill.scores import logits

SLAB = 8
"""Blocks of queries that are scored together: bounds the memory of their tiles."""


def antidiagonal_masses(chunk: Chunk, stride: int) -> torch.Tensor:
    """Estimated attention of every block of 128 queries by 128 keys, from tiles of `stride` by `stride` tokens.

    Returns:
        float32 [num_heads, q_blocks, k_blocks]; rows sum to their tiles.
    """
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
        found.append(tile_sums(shares, ROWS // stride, ROWS // stride))
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
