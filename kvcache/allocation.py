"""Allocators: how a request's budget is shared over its layers (and KV heads)."""

from __future__ import annotations

import torch


def apportion(weights: torch.Tensor, total: int, low: int, high: int) -> torch.Tensor:
    """Whole numbers near `weights` that lie in [low, high] and sum to exactly `total`.

    What a bound cuts off is spread over the entries still free, in proportion to their weights (water-filling);
    the fractions go by largest remainder, the lower index first on ties.

    Args:
        weights: float [n], wished-for amounts >= 0; only their proportions matter.
        total: the sum to reach.
        low, high: bounds of every entry, in the same unit as `total`.

    Returns:
        int64 [n].

    Raises:
        ValueError: when no such numbers exist (`n * low > total` or `n * high < total`).
    """
    n = weights.numel()
    if not n * low <= total <= n * high:
        raise ValueError(f"cannot share {total} over {n} entries of at least {low} and at most {high}")
    share = _water_fill(weights.to(torch.float64).clamp(min=0), float(total), float(low), float(high))
    # 1e-6 keeps an exact 16 that floating point made 15.9999999 from counting as a fraction, and ties ties.
    whole = (share + 1e-6).floor().to(torch.int64).clamp(low, high)
    missing = total - int(whole.sum())
    remainder = ((share - whole) * 1e6).round()
    order = torch.sort(remainder, descending=missing > 0, stable=True).indices.tolist()
    step = 1 if missing > 0 else -1
    while missing:
        for i in order:
            if missing and low <= int(whole[i]) + step <= high:
                whole[i] += step
                missing -= step
    return whole


def _water_fill(weights: torch.Tensor, total: float, low: float, high: float) -> torch.Tensor:
    """Real shares in [low, high] that sum to `total`, proportional to `weights` wherever no bound holds."""
    if float(weights.sum()) <= 0 or bool((weights == weights[0]).all()):
        return torch.full_like(weights, total / weights.numel())
    # scale -> sum(clamp(scale * weights)) grows monotonically, so bisection finds the scale. Plain numbers: a torch
    # call for each step would take longer than the copying of a compaction.
    weights = weights.clamp(min=max(float(weights.max()) * 1e-9, 1e-300))
    values = weights.tolist()
    bottom, top = 0.0, max(high, 1.0) / min(values)
    while bottom < (middle := (bottom + top) / 2) < top:
        if sum(min(max(value * middle, low), high) for value in values) < total:
            bottom = middle
        else:
            top = middle
    return (weights * top).clamp(low, high)


def uniform_shares(num_layers: int, budget: int) -> torch.Tensor:
    """The same for every layer: float64 [num_layers], tokens."""
    return torch.full((num_layers,), float(budget), dtype=torch.float64)


def pyramid_bounds(scored: int, room: int, beta: int) -> tuple[int, int]:
    """Scored tokens of the lowest and of the highest layer: PyramidKV (arXiv 2406.02069), section 3.2.

    Args:
        scored: budget less the window, tokens.
        room: prompt less the window, tokens: what a layer can keep at most.
        beta: steepness; the highest layer keeps `scored // beta`.

    Returns:
        (lowest layer, highest layer), tokens, with mean `scored`.
    """
    high_layer = scored // beta
    low_layer = 2 * scored - high_layer
    if low_layer >= room:
        low_layer, high_layer = room, 2 * scored - room
    return low_layer, high_layer


def pyramid_shares(num_layers: int, budget: int, prompt_len: int, window: int, beta: int) -> torch.Tensor:
    """Lower layers keep more, linearly: float64 [num_layers], tokens, with sum exactly `num_layers * budget`.

    The published rule rounds the step down to a whole number and so overspends (12,400 tokens for a nominal 9,600
    at 80 layers and budget 128); real steps don't. As published, a prompt under twice the scored budget is shared
    uniformly.
    """
    scored, room = budget - window, prompt_len - window
    if num_layers == 1 or prompt_len < 2 * scored:
        return uniform_shares(num_layers, budget)
    first, last = pyramid_bounds(scored, room, beta)
    return torch.linspace(first, last, num_layers, dtype=torch.float64) + window
