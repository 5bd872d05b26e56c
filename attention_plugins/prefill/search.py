"""HiP's binary search for the best token of a chunk."""

from __future__ import annotations

import torch

from attention_plugins.prefill.base import Chunk, gather
from attention_plugins.prefill.grid import ROWS


def best_of_chunks(chunk: Chunk, starts: torch.Tensor, size: int, stride: int, share_heads: bool) -> torch.Tensor:
    """Score of the token that a binary search ends at, in chunks of keys: its largest product with a block's queries.

    Args:
        starts: int64 [heads, q_blocks, m], positions; what lies behind the last key counts as the last.
        size: keys of a chunk, a power of two.
        stride: one of so many queries takes part.
        share_heads: whether the largest of all heads counts, and `heads` is 1; or those of a KV head, one each.

    Returns:
        float32, like `starts`; NaN where some product that was looked at last is.
    """
    return Search(chunk, stride, share_heads).best(starts, size)


class Search:
    """Scores tokens for each block of queries."""

    def __init__(self, chunk: Chunk, stride: int, share_heads: bool) -> None:
        self.chunk, self.share_heads = chunk, share_heads
        blocks = torch.arange(0, chunk.q_len, ROWS, device=chunk.queries.device)[:, None]
        rows = blocks + torch.arange(0, ROWS, stride, device=chunk.queries.device)
        queries = chunk.queries[rows.clamp(max=chunk.q_len - 1)] * chunk.scale
        # [num_kv_heads, q_blocks, rows of all heads of the group, d]
        self.queries = queries.unflatten(2, (chunk.num_kv_heads, -1)).permute(2, 0, 1, 3, 4).flatten(2, 3)

    def score(self, positions: torch.Tensor) -> torch.Tensor:
        """Largest product of each token: int64 [heads, q_blocks, m] -> float32, the same shape."""
        at = positions.clamp(max=self.chunk.k_len - 1).expand(self.chunk.num_kv_heads, -1, -1)
        keys = gather(self.chunk.keys, at)
        scores = (self.queries.to(keys.dtype) @ keys.transpose(2, 3)).amax(2).float()
        return scores.amax(0, keepdim=True) if self.share_heads else scores

    def best(self, starts: torch.Tensor, size: int) -> torch.Tensor:
        """See `best_of_chunks`."""
        scores = self.score(starts) if size == 1 else torch.empty(0)
        while size > 1:
            size //= 2
            left, right = self.score(torch.cat([starts + size // 2, starts + size + size // 2], -1)).chunk(2, -1)
            starts = torch.where(right > left, starts + size, starts)
            scores = torch.maximum(left, right)
        return scores
