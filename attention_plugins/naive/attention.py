"""Attention over listed tokens or pages."""

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


def page_attention(
    out: torch.Tensor,
    queries: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    rows: DecodeRows,
    cache: LayerCache,
    want: int,
    most: int,
) -> None:
    """Softmax attention of wanted rows over their pages, for short lists.

    Args:
        out, queries: as `slot_attention` takes them; other rows stay as they are.
        pages: int32 [n * num_kv_heads, width].
        lengths: int32 [n * num_kv_heads], tokens; only the last page may be partly filled.
        most: no wanted row's length is larger.
    """
    real, heads, size = real_queries(cache, queries), cache.geometry.num_kv_heads, cache.geometry.page_size
    for row, head in wanted_heads(rows, cache, want):
        places = torch.arange(int(lengths[row * heads + head]), device=pages.device)
        slots = pages[row * heads + head, places // size].long() * size + places % size
        keys, values = read(cache, slots)
        out[row, head] = ((real[row, head] @ keys.T * cache.scale).softmax(-1) @ values).to(out.dtype)
