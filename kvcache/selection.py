"""From scores to kept positions."""

from __future__ import annotations

import torch


def force(scores: torch.Tensor, sinks: int, recent: int) -> torch.Tensor:
    """A copy of `scores` [..., n] in which the first `sinks` and last `recent` tokens always stay, NaNs before others.

    NaN means that a score could not be computed; keeping the token is the conservative choice. Where more are NaN
    than fit (one NaN key makes all its head's votes NaN), they don't push out the forced tokens.
    """
    forced = scores.float().nan_to_num(nan=torch.finfo(torch.float32).max, neginf=float("-inf"))
    forced[..., :sinks] = float("inf")
    if recent:
        forced[..., -recent:] = float("inf")
    return forced


def keep_top(scores: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
    """The positions of each head's highest scores, ascending; of equal scores the lower position wins.

    Args:
        scores: float32 [num_kv_heads, n].
        counts: tokens to keep of each head, 0 <= count <= n.

    Returns:
        num_kv_heads tensors int64 [count].

    Raises:
        ValueError: when a count is outside 0..n.
    """
    n = scores.shape[-1]
    if any(not 0 <= count <= n for count in counts):
        raise ValueError(f"cannot keep {counts} of {n} tokens")
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    wanted = torch.arange(n) < torch.tensor(counts)[:, None]
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, wanted.to(scores.device))
    return list(kept.nonzero()[:, 1].split(counts))
