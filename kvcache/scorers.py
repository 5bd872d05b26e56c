"""Scorers in plain torch: from evidence to one number per prompt token and KV head. Higher stays."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from kvcache.evidence import LayerEvidence, PagedEvidence, dequantise

# Bounds the memory of `reduced_probabilities`: logits held at once, 4 bytes each, unless one KV head alone has more.
_MAX_LOGITS = 1 << 26
# The same for `column_sums`, unless one query of one KV head has more. Small: pieces that stay in a CPU's cache are
# faster, and each piece of queries sees no keys behind its last one.
_MAX_COLUMN_LOGITS = 1 << 20

GroupReduce = Literal["mean", "max", "sum"]
GroupStage = Literal["probabilities", "logits"]
Pooling = Literal["avg", "max", "none"]
WindowReduce = Literal["mean", "max"]


def reduce_group(scores: torch.Tensor, how: GroupReduce, dim: int) -> torch.Tensor:
    """Query heads of one group to their KV head."""
    if how == "max":
        return scores.amax(dim)
    return scores.mean(dim) if how == "mean" else scores.sum(dim)


def pool(scores: torch.Tensor, how: Pooling, kernel: int) -> torch.Tensor:
    """1-D pooling over the last dimension, stride 1, same length.

    As in SnapKV's code, zeros pad the ends and the average divides by the whole kernel there too: this damps the
    first tokens, so sinks have to be forced after it, never before.

    Args:
        scores: float [..., n].
        kernel: odd.
    """
    if how == "none" or kernel == 1:
        return scores
    flat = scores.reshape(1, -1, scores.shape[-1])
    half = kernel // 2
    if how == "avg":
        return F.avg_pool1d(flat, kernel, 1, half, count_include_pad=True).reshape(scores.shape)
    return F.max_pool1d(flat, kernel, 1, half).reshape(scores.shape)


def window_probabilities(evidence: LayerEvidence, window_reduce: WindowReduce = "mean") -> torch.Tensor:
    """The attention that the window's queries give to each earlier token, their mean or the most that one gives; on a
    GPU by kernels.

    The kernels read keys where they lie in the cache. Means are asked for through `LayerEvidence.window_attention`,
    which remembers them.

    Returns:
        float32 [num_heads, prompt_len - w].

    Raises:
        ValueError: the evidence has no queries.
    """
    if isinstance(evidence, PagedEvidence) and evidence.pages.is_cuda:
        from kvcache.kernels.window_votes import window_probabilities_paged

        return window_probabilities_paged(evidence, window_reduce)
    found = reduced_probabilities(_queries(evidence), evidence.keys, evidence.scale, window_reduce=window_reduce)
    return found.flatten(0, 1)


def window_votes(
    evidence: LayerEvidence,
    *,
    pooling: Pooling = "avg",
    kernel: int = 5,
    group_reduce: GroupReduce = "mean",
    group_stage: GroupStage = "probabilities",
    window_reduce: WindowReduce = "mean",
) -> torch.Tensor:
    """SnapKV's vote (arXiv 2404.14469): what the window gives to each earlier token, pooled, by KV head.

    Mean (or maximum) over the window's queries of the softmax over all keys, pooling over positions, then the query
    heads of a group are reduced to their KV head. With `group_stage="logits"` the group is reduced before the softmax
    (R-KV's order), by torch everywhere.

    Returns:
        float32 [num_kv_heads, prompt_len - w].

    Raises:
        ValueError: the evidence has no queries.
    """
    num_kv_heads = evidence.shape[0]
    if group_stage == "logits":
        queries = _queries(evidence)
        votes = reduced_probabilities(
            queries, evidence.keys, evidence.scale, window_reduce=window_reduce, group_logits=group_reduce
        )
        return pool(votes[:, 0], pooling, kernel)
    votes = evidence.window_attention if window_reduce == "mean" else window_probabilities(evidence, window_reduce)
    if votes.is_cuda:
        from kvcache.kernels.window_votes import pool_votes

        return pool_votes(votes, num_kv_heads, pooling=pooling, kernel=kernel, group_reduce=group_reduce)
    return reduce_group(pool(votes, pooling, kernel).unflatten(0, (num_kv_heads, -1)), group_reduce, 1)


def _queries(evidence: LayerEvidence) -> torch.Tensor:
    if evidence.window_queries is None:
        raise ValueError("the prompt's last queries are needed and were not kept")
    return evidence.window_queries


def reduced_probabilities(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    *,
    window_reduce: WindowReduce = "mean",
    group_logits: GroupReduce | None = None,
) -> torch.Tensor:
    """Causal softmax of the last w queries over all keys, mean or maximum over the queries.

    Args:
        queries: [w, num_heads, head_dim], post-RoPE, of the last w positions.
        keys: [num_kv_heads, n, head_dim], post-RoPE.
        scale: softmax scale.
        group_logits: how a group's logits are reduced before the softmax; left out, they aren't.

    Returns:
        float32 [num_kv_heads, group (1 with `group_logits`), n - w].
    """
    w, num_heads, head_dim = queries.shape
    num_kv_heads, n, _ = keys.shape
    group = num_heads // num_kv_heads
    grouped = queries.float().view(w, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    future = torch.arange(n, device=keys.device) > torch.arange(n - w, n, device=keys.device)[:, None]
    reduced = []
    together = max(1, _MAX_LOGITS // (group * w * n))
    for heads in torch.arange(num_kv_heads).split(together):
        first, last = int(heads[0]), int(heads[-1]) + 1
        logits = grouped[first:last] @ keys[first:last, None].float().transpose(-1, -2) * scale
        if group_logits:
            logits = reduce_group(logits, group_logits, 1)[:, None]
        probabilities = logits.masked_fill_(future, float("-inf")).softmax(-1)
        reduced.append(reduce_group(probabilities, window_reduce, 2)[..., : n - w])
    return torch.cat(reduced)


def window_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    *,
    pooling: Pooling = "avg",
    kernel: int = 5,
    group_reduce: GroupReduce = "mean",
    group_stage: GroupStage = "probabilities",
    window_reduce: WindowReduce = "mean",
) -> torch.Tensor:
    """`window_votes` of plain tensors (see `reduced_probabilities`): the naive twin of the kernels."""
    evidence = LayerEvidence(0, keys, keys, queries, scale)
    return window_votes(
        evidence, pooling=pooling, kernel=kernel, group_reduce=group_reduce, group_stage=group_stage,
        window_reduce=window_reduce,
    )  # fmt: skip


def column_sums(queries: torch.Tensor, keys: torch.Tensor, scale: float, first: int) -> torch.Tensor:
    """What each token gets from these queries: causal softmax, summed over queries, mean over a group's query heads.

    Args:
        queries: [m, num_heads, head_dim], post-RoPE, of positions first ... first + m - 1.
        keys: [num_kv_heads, n, head_dim], post-RoPE, of positions 0 ... n - 1; first + m <= n.
        scale: softmax scale.

    Returns:
        float32 [num_kv_heads, first + m].
    """
    m, num_heads, head_dim = queries.shape
    num_kv_heads, end = len(keys), first + m
    group = num_heads // num_kv_heads
    grouped = (queries.float() * scale).view(m, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    by_dim = keys[:, :end].float().transpose(-1, -2).contiguous()
    sums = torch.zeros(num_kv_heads, end, device=keys.device)
    piece = min(m, max(1, _MAX_COLUMN_LOGITS // (group * end)))
    together = max(1, _MAX_COLUMN_LOGITS // (group * end * piece))
    future = torch.ones(piece, piece, dtype=torch.bool, device=keys.device).triu(1)
    for begin in range(0, m, piece):
        rows = min(piece, m - begin)
        seen = first + begin + rows
        for head in range(0, num_kv_heads, together):
            heads = slice(head, head + together)
            logits = grouped[heads, :, begin : begin + rows].flatten(1, 2) @ by_dim[heads, :, :seen]
            last_keys = logits.unflatten(1, (group, rows))[..., -rows:]
            last_keys.masked_fill_(future[:rows, :rows], float("-inf"))
            sums[heads, :seen] += logits.softmax(-1).sum(1) / group
    return sums


def observed_column_sums(evidence: LayerEvidence, queries: torch.Tensor, first: int) -> torch.Tensor:
    """`column_sums` of queries as the model's attention gets them; on a GPU by kernels, which read keys in their pages.

    Args:
        evidence: keys of all positions up to the last of these queries, at least.
        queries: [m, num_heads, head_dim], fp8 with an fp8 cache.
        first: position of the first of them.
    """
    if isinstance(evidence, PagedEvidence):
        if evidence.pages.is_cuda:
            from kvcache.kernels.column_sums import column_sums_paged

            return column_sums_paged(evidence, queries, first)
        queries = dequantise(queries, evidence.quant.query)
    return column_sums(queries, evidence.keys, evidence.scale, first)
