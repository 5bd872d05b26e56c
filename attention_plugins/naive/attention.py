"""Attention over listed tokens."""

from __future__ import annotations

import torch

from attention_plugins.decode.rows import DecodeRows, LayerCache
from attention_plugins.naive.sequences import nan_first, read, real_queries, wanted_heads


def slot_attention(
    out: torch.Tensor,
    queries: torch.Tensor,
    slots: torch.Tensor,
    counts: torch.Tensor,
    into: torch.Tensor,
    rows: DecodeRows,
    cache: LayerCache,
    want: int,
    logits: torch.Tensor | None = None,
) -> None:
    """Softmax attention of wanted rows over the tokens `slots[into[row], head, :count]`.

    Args:
        out: [n, num_kv_heads, group, head_dim], the model's dtype; zeros where nothing is listed.
        queries: the same shape; the model's dtype or fp8.
        slots: int32 [S, num_kv_heads, W].
        counts: int32 [S, num_kv_heads].
        into: int32 [n], first index into both; -1: nothing is written.
        want: set of `Mode`s.
        logits: float32 [n, num_kv_heads, W], gets for each listed token the largest log-probability among the group's
            query heads, infinity for NaN; what is behind the count stays.
    """
    real, indices = real_queries(cache, queries), into.tolist()
    for row, head in wanted_heads(rows, cache, want):
        if indices[row] < 0:
            continue
        count = int(counts[indices[row], head])
        keys, values = read(cache, slots[indices[row], head, :count].long())
        each = real[row, head] @ keys.T * cache.scale
        out[row, head] = (each.softmax(-1) @ values).to(out.dtype)
        if logits is not None:
            logits[row, head, :count] = nan_first(each.log_softmax(-1).amax(0))
