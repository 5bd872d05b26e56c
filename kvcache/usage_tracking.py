"""How much use the watched queries made of each token: what LRA, LFA and RaaS count."""

from __future__ import annotations

import torch

from kvcache.evidence import LayerEvidence

# Bounds memory: logits held at once, 4 bytes each, unless one KV head alone has more.
_MAX_LOGITS = 1 << 25


def watched_attention(evidence: LayerEvidence) -> torch.Tensor:
    """What each watched query gives to each token, itself included: causal softmax, mean over a group's query heads.

    Returns:
        float32 [num_kv_heads, w, n].

    Raises:
        ValueError: the evidence has no queries.
    """
    queries = evidence.window_queries
    if queries is None:
        raise ValueError("the last queries are needed and were not kept")
    num_kv_heads, n, head_dim = evidence.shape
    w, group = len(queries), queries.shape[1] // num_kv_heads
    grouped = queries.float().view(w, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    future = torch.arange(n, device=evidence.device) > torch.arange(n - w, n, device=evidence.device)[:, None]
    together = max(1, _MAX_LOGITS // (group * w * n))
    parts = []
    for first in range(0, num_kv_heads, together):
        keys = evidence.keys[first : first + together, None].float()
        logits = grouped[first : first + together] @ keys.transpose(-1, -2) * evidence.scale
        parts.append(logits.masked_fill_(future, float("-inf")).softmax(-1).mean(1))
    return torch.cat(parts)


def ranked(statistic: torch.Tensor) -> torch.Tensor:
    """Scores that order tokens by a statistic; of equal ones the older goes first.

    Args:
        statistic: float [..., n]; a NaN stays one.

    Returns:
        float32 [..., n]: 0, 1, 2, ..., exact up to 16 million tokens.
    """
    order = statistic.nan_to_num(0).sort(dim=-1, stable=True).indices
    ranks = torch.arange(statistic.shape[-1], dtype=torch.float32, device=statistic.device).expand(statistic.shape)
    scores = torch.empty_like(ranks).scatter_(-1, order, ranks)
    return scores.masked_fill(statistic.isnan(), float("nan"))


def unknown(statistic: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """NaN where a watched query's attention is: [num_kv_heads, n] and [num_kv_heads, w, n]."""
    return statistic.masked_fill(attention.isnan().any(1), float("nan"))


def last_use(used: torch.Tensor, evidence: LayerEvidence) -> torch.Tensor:
    """When each token was last used; before its first use, when it came.

    Args:
        used: bool [num_kv_heads, w, n], whether a watched query used a token.

    Returns:
        float32 [num_kv_heads, n], positions.
    """
    w, positions = used.shape[1], evidence.positions.float()
    now = positions[:, -w:, None]
    stamps = (
        positions if evidence.history is None else torch.where(evidence.history.isnan(), positions, evidence.history)
    )
    return torch.maximum(stamps, torch.where(used, now, -1.0).amax(1))


def top_k(attention: torch.Tensor, k: int) -> torch.Tensor:
    """Which tokens are among the `k` that a query attends to most: bool, the attention's shape. Zeros never are."""
    k = min(k, attention.shape[-1])
    chosen = torch.zeros_like(attention, dtype=torch.bool)
    return chosen.scatter_(-1, attention.topk(k, -1).indices, True) & (attention > 0)
