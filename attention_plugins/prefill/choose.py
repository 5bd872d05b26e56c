"""Choosing by score, without asking the GPU how many. Of equal scores the lower position wins; NaN is kept."""

from __future__ import annotations

import torch

ROUNDING = 1e-6
"""Shares that differ by less are the same: sums of float32 probabilities aren't exact."""


def ranks(scores: torch.Tensor) -> torch.Tensor:
    """Place of each score along the last dimension, the highest is 0: int64, the same shape."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def top(scores: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """The highest scores: bool, the same shape.

    Args:
        count: how many; int64 that broadcasts to [..., 1] for one per row.
    """
    return (ranks(scores) < count) | scores.isnan()


def cover(mass: torch.Tensor, share: float, first: torch.Tensor | None = None) -> torch.Tensor:
    """The fewest entries of each row that reach this share of its sum: bool, the same shape.

    Args:
        mass: >= 0. A row with NaN is chosen whole.
        first: bool, broadcasts; entries that are chosen, and counted, before the others.
    """
    if share >= 1:
        return torch.ones_like(mass, dtype=torch.bool)
    forced = torch.zeros_like(mass, dtype=torch.bool) if first is None else first.expand_as(mass)
    order = mass.masked_fill(forced, float("inf")).sort(dim=-1, descending=True, stable=True).indices
    ordered = mass.gather(-1, order)
    before = ordered.cumsum(-1) - ordered
    wanted = before < (share - ROUNDING) * mass.sum(-1, keepdim=True)
    chosen = torch.empty_like(wanted).scatter_(-1, order, wanted)
    return chosen | forced | mass.isnan().any(-1, keepdim=True)


def count_to_reach(mass: torch.Tensor, share: float) -> torch.Tensor:
    """FlexPrefill's count: one more than the largest entries whose sum stays within `share`; int64 [..., 1].

    At most all of them: the paper's code can go one past the end.

    Args:
        mass: rows that sum to 1.
    """
    length = mass.shape[-1]
    if share >= 1:
        return torch.full((*mass.shape[:-1], 1), length, device=mass.device)
    sums = mass.sort(dim=-1, descending=True).values.cumsum(-1)
    return ((sums <= share + ROUNDING).sum(-1, keepdim=True) + 1).clamp(max=length)
