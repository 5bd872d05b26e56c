"""Attention over page tables, one query a row."""

from __future__ import annotations

import torch

from attention_plugins.decode.rows import LayerCache
from attention_plugins.naive.sequences import read, real_queries


def read_pages(
    out: torch.Tensor, queries: torch.Tensor, pages: torch.Tensor, lengths: torch.Tensor, cache: LayerCache
) -> torch.Tensor:
    """Softmax attention of each (row, KV head) over its pages; only the last may be partly filled.

    Args:
        out: [n, num_kv_heads, group, head_dim], written; zeros where the length is 0.
        queries: the same shape; the model's dtype or fp8.
        pages: int32 [n * num_kv_heads, width].
        lengths: int32 [n * num_kv_heads], tokens.

    Returns:
        Natural logarithm of the softmax's denominators, float32 [n, num_kv_heads, group]; -inf where the length is 0.
    """
    real, size = real_queries(cache, queries).flatten(0, 1), cache.geometry.page_size
    results, lse = out.flatten(0, 1), torch.full(real.shape[:2], float("-inf"), device=out.device)
    for index, length in enumerate(lengths.tolist()):
        if not length:
            results[index] = 0
            continue
        places = torch.arange(length, device=out.device)
        keys, values = read(cache, pages[index, places // size].long() * size + places % size)
        each = real[index] @ keys.T * cache.scale
        lse[index] = each.logsumexp(-1)
        results[index] = (each.softmax(-1) @ values).to(out.dtype)
    return lse.unflatten(0, queries.shape[:2])
