"""Scores for every token of a row."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from attention_plugins.decode.rows import DecodeRows, LayerCache
from attention_plugins.naive.sequences import Sequences, nan_first, read, real_queries, wanted, wanted_heads


def token_scores(
    scores: torch.Tensor,
    rows: DecodeRows,
    cache: LayerCache,
    queries: torch.Tensor,
    want: int,
    lse: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    reduce: Literal["max", "mean"] = "max",
) -> None:
    """Over a group's query heads, the largest or the mean of softmax logits, or of probabilities where `lse` is given.

    Args:
        scores: float32 [num_kv_heads, columns]; of wanted rows, those from `rows.starts` on are written. A score that
            isn't a number is stored as infinity.
        queries: [n, num_kv_heads, group, head_dim], or labels' width instead of head_dim.
        want: set of `Mode`s.
        lse: float32 [n, num_kv_heads, group], natural logarithm of the softmax's denominators.
        labels: [num_pages * page_size, width], stand-ins for keys by slot; else the cache's keys.
    """
    sequences, real = Sequences.of(rows, cache), real_queries(cache, queries)
    for row, head in wanted_heads(rows, cache, want):
        slots = sequences.slots(row, head)
        keys = read(cache, slots)[0] if labels is None else labels[slots].float()
        each = keys @ real[row, head].T * cache.scale
        if lse is not None:
            each = (each - lse[row, head]).exp()
        start = int(rows.starts[row])
        scores[head, start : start + len(slots)] = nan_first(each.amax(-1) if reduce == "max" else each.mean(-1))


def add_heads(scores: torch.Tensor, rows: DecodeRows, cache: LayerCache, want: int) -> None:
    """Let each token's scores of all KV heads be their sum, in wanted rows whose threshold is above 0. Heads of such a
    row hold the same tokens.

    Args:
        scores: float32 [num_kv_heads, columns]; of these rows, those from `rows.starts` on are written. A sum that
            isn't a number is stored as infinity.
        want: set of `Mode`s.
    """
    sequences = Sequences.of(rows, cache)
    for row in wanted(rows, want):
        if rows.thresholds[row] > 0:
            start = int(rows.starts[row])
            own = scores[:, start : start + int(sequences.lengths[row, 0])]
            own.copy_(nan_first(own.sum(0)))


def pool_scores(pooled: torch.Tensor, scores: torch.Tensor, rows: DecodeRows, cache: LayerCache, want: int) -> None:
    """The largest score among a token and its neighbours, `rows.pooling` to either side.

    Args:
        pooled, scores: float32 [num_kv_heads, columns], not the same; of wanted rows, those from `rows.starts` on.
        want: set of `Mode`s.
    """
    sequences = Sequences.of(rows, cache)
    for row, head in wanted_heads(rows, cache, want):
        start, length, reach = int(rows.starts[row]), int(sequences.lengths[row, head]), int(rows.pooling[row])
        own = scores[head, start : start + length]
        pooled[head, start : start + length] = F.max_pool1d(own[None], 2 * reach + 1, 1, reach)[0]
