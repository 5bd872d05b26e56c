"""Scorers in plain torch: from evidence to one number per prompt token and KV head. Higher stays."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F

from kvcache.evidence import LayerEvidence, PagedEvidence

# Bounds the memory of `window_attention`: logits held at once, 4 bytes each, unless one KV head alone has more.
_MAX_LOGITS = 1 << 26

GroupReduce = Literal["mean", "max", "sum"]
GroupStage = Literal["probabilities", "logits"]
Pooling = Literal["avg", "max", "none"]


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


def window_votes(
    evidence: LayerEvidence,
    *,
    pooling: Pooling = "avg",
    kernel: int = 5,
    group_reduce: GroupReduce = "mean",
    group_stage: GroupStage = "probabilities",
) -> torch.Tensor:
    """SnapKV's vote (arXiv 2404.14469) on a layer's evidence: `window_attention`, on a GPU by kernels.

    The kernels read keys where they lie in the cache. With `group_stage="logits"` torch does the work everywhere.

    Returns:
        float32 [num_kv_heads, prompt_len - w].

    Raises:
        ValueError: the evidence has no queries.
    """
    options: dict[str, Any] = {"pooling": pooling, "kernel": kernel, "group_reduce": group_reduce}
    if isinstance(evidence, PagedEvidence) and evidence.pages.is_cuda and group_stage == "probabilities":
        from kvcache.kernels.window_votes import window_votes_paged

        return window_votes_paged(evidence, **options)
    if evidence.window_queries is None:
        raise ValueError("the prompt's last queries are needed and were not kept")
    return window_attention(evidence.window_queries, evidence.keys, evidence.scale, group_stage=group_stage, **options)


def window_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    *,
    pooling: Pooling = "avg",
    kernel: int = 5,
    group_reduce: GroupReduce = "mean",
    group_stage: GroupStage = "probabilities",
) -> torch.Tensor:
    """SnapKV's vote (arXiv 2404.14469): the attention that the last w queries give to each earlier token.

    Softmax over all keys with the causal mask, mean over the window's queries, pooling over positions, then the
    query heads of a group are reduced to their KV head. With `group_stage="logits"` the group is reduced before
    the softmax (R-KV's order).

    Args:
        queries: [w, num_heads, head_dim], post-RoPE, of the last w positions.
        keys: [num_kv_heads, n, head_dim], post-RoPE.
        scale: softmax scale.

    Returns:
        float32 [num_kv_heads, n - w].
    """
    w, num_heads, head_dim = queries.shape
    num_kv_heads, n, _ = keys.shape
    group = num_heads // num_kv_heads
    grouped = queries.float().view(w, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    future = torch.arange(n, device=keys.device) > torch.arange(n - w, n, device=keys.device)[:, None]
    votes = []
    together = max(1, _MAX_LOGITS // (group * w * n))
    for heads in torch.arange(num_kv_heads).split(together):
        first, last = int(heads[0]), int(heads[-1]) + 1
        logits = grouped[first:last] @ keys[first:last, None].float().transpose(-1, -2) * scale
        if group_stage == "logits":
            logits = reduce_group(logits, group_reduce, 1)[:, None]
        probabilities = logits.masked_fill_(future, float("-inf")).softmax(-1)
        vote = pool(probabilities.mean(2)[..., : n - w], pooling, kernel)
        votes.append(reduce_group(vote, group_reduce, 1))
    return torch.cat(votes)
