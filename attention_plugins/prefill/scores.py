"""What patterns look at: logits of a few queries, pooled queries and keys. Never all queries by all keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from attention_plugins.prefill.base import TILE, Chunk
from attention_plugins.prefill.grid import ROWS


def logits(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled products, heads of a group beside each other so that keys needn't be repeated.

    Computed in the keys' dtype: estimates don't need more, and tensor cores want it. Queries are scaled first, which
    keeps float16 from overflowing.

    Args:
        queries: [rows, num_heads, d].
        keys: [num_kv_heads, n, d].

    Returns:
        float32 [num_heads, rows, n].
    """
    rows, num_heads, d = queries.shape
    grouped = (queries * scale).to(keys.dtype).unflatten(1, (len(keys), -1)).permute(1, 2, 0, 3)
    return (grouped.reshape(len(keys), -1, d) @ keys.transpose(1, 2)).float().view(num_heads, rows, -1)


def attention_tiles(chunk: Chunk, rows: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Attention of some of the chunk's queries, one tile of keys after the other.

    Products are computed twice, first for the softmax's denominators: memory doesn't grow with the context.

    Args:
        rows: int64 [m], counted from the chunk's start.

    Yields:
        Position of the tile's first key, and float32 [num_heads, m, keys of the tile], 0 above the diagonal.
    """
    queries, positions = chunk.queries[rows], chunk.offset + rows

    def products() -> Iterator[tuple[int, torch.Tensor]]:
        for first, keys in chunk.tiles():
            above = torch.arange(first, first + keys.shape[1], device=rows.device) > positions[:, None]
            yield first, logits(queries, keys, chunk.scale).masked_fill_(above, float("-inf"))

    lse = torch.stack([tile.logsumexp(-1) for _, tile in products()]).logsumexp(0)
    for first, tile in products():
        yield first, tile.sub_(lse[..., None]).exp_()


def column_sums(chunk: Chunk, rows: torch.Tensor) -> torch.Tensor:
    """Attention of some of the chunk's queries (see `attention_tiles`) to each key: float32 [num_heads, k_len]."""
    return torch.cat([tile.sum(1) for _, tile in attention_tiles(chunk, rows)], -1)


def last_row_sums(chunk: Chunk, count: int) -> torch.Tensor:
    """Attention of the chunk's last queries, at most `count`, by key, and by distance from query back to key.

    Returns:
        float32 [2, num_heads, k_len]: columns, and diagonals.
    """
    count = min(count, chunk.q_len)
    rows = torch.arange(chunk.q_len - count, chunk.q_len, device=chunk.queries.device)
    columns = []
    # Distances from `1 - count` on: a tile's corner lies above the diagonal.
    diagonals = torch.zeros(chunk.num_heads, chunk.k_len + count - 1, device=rows.device)
    for first, tile in attention_tiles(chunk, rows):
        columns.append(tile.sum(1))
        found = diagonal_sums(tile)
        start = chunk.k_len - first - tile.shape[-1]
        diagonals[:, start : start + found.shape[-1]] += found
    return torch.stack([torch.cat(columns, -1), diagonals[:, count - 1 :]])


def diagonal_sums(tile: torch.Tensor) -> torch.Tensor:
    """Sums along the diagonals, from the upper right corner to the lower left: [heads, m, n] -> [heads, m + n - 1]."""
    heads, m, n = tile.shape
    width = n + 2 * (m - 1)
    # With rows and columns reversed, each row's part of a diagonal is one further right than the row's above. Reading
    # rows as one longer than they are is this shear, without a copy.
    padded = F.pad(tile.flip(1, 2), (m - 1, m - 1)).contiguous()
    return padded.as_strided((heads, m, m + n - 1), (m * width, width + 1, 1)).sum(1)


def block_sums(scores: torch.Tensor, block: int) -> torch.Tensor:
    """Sums over blocks of the last dimension, the last one may be short: [..., n] -> [..., ceil(n / block)]."""
    return F.pad(scores, (0, -scores.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def pooled_queries(chunk: Chunk) -> torch.Tensor:
    """Mean query of each block: float32 [q_blocks, num_heads, d]."""
    queries = F.pad(chunk.queries.float(), (0, 0, 0, 0, 0, -chunk.q_len % ROWS)).unflatten(0, (-1, ROWS))
    sizes = chunk.grid.last_rows - chunk.grid.first_rows + 1
    return queries.sum(1) / sizes[:, None, None]


def pooled_keys(chunk: Chunk, block: int) -> torch.Tensor:
    """Mean key of each block of `block` keys: float32 [num_kv_heads, k_blocks, d]."""
    sums = [block_sums(keys.float().transpose(1, 2), block) for _, keys in chunk.tiles(TILE // block * block)]
    starts = torch.arange(0, chunk.k_len, block, device=chunk.queries.device)
    return torch.cat(sums, -1).transpose(1, 2) / (chunk.k_len - starts).clamp(max=block)[:, None]


def block_logits(chunk: Chunk, block: int, keys: torch.Tensor | None = None) -> torch.Tensor:
    """Products of mean queries with mean keys, -inf for blocks of keys that no row sees.

    Args:
        keys: the mean keys, if they are known.

    Returns:
        float32 [num_heads, q_blocks, k_blocks(block)].
    """
    keys = chunk.ops.pooled_keys(chunk, block) if keys is None else keys
    found = logits(chunk.ops.pooled_queries(chunk), keys, chunk.scale)
    starts = torch.arange(0, chunk.k_len, block, device=found.device)
    return found.masked_fill_(starts > chunk.grid.last_rows[:, None], float("-inf"))
