"""MInference's offline search: which kind and sizes each head gets."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attention_plugins.prefill.attention import dense_attention, sparse_attention
from attention_plugins.prefill.base import Chunk
from attention_plugins.prefill.minference import BLOCK, FORCED, Kind, plan_heads

Candidate = tuple[int, int, int]
"""Kind and sizes, a row of the table."""
SHARES = 0.01, 0.05, 0.15, 0.4
"""Of a candidate's tokens, those that are columns or first tokens; the others are diagonals or last tokens."""
SIZES = 32
"""Steps of the ladder of sizes that the search climbs as far as the density allows."""


def candidates(k_len: int, least: int = 128) -> list[Candidate]:
    """Kinds and shares in a ladder of sizes, from `least` tokens (128 or more) to all: what `search` picks from."""
    found, least = [], max(128, min(least, k_len))
    for step in range(SIZES):
        tokens = round(least * (max(k_len, least) / least) ** (step / (SIZES - 1)))
        for share in SHARES:
            first, second = max(FORCED, round(share * tokens)), max(50, round((1 - share) * tokens))
            found += [(int(Kind.VERTICAL_SLASH), first, second), (int(Kind.A_SHAPE), first, second)]
        found.append((int(Kind.BLOCK_SPARSE), -(-tokens // BLOCK), 0))
    return list(dict.fromkeys(found))


def search(chunk: Chunk, values: torch.Tensor, choices: Sequence[Candidate], density: float) -> torch.Tensor:
    """For each head, the choice nearest to dense attention's output among those that compute no more than `density`.

    The paper compares candidates of equal FLOPs; here what a candidate really computes of this sample is measured, so
    that rounding to units counts. Runs each choice once, on all heads: for `longreach calibrate`, not for serving.

    Args:
        chunk: a sample of text, one layer; the paper takes one of 30k tokens.
        values: [num_kv_heads, k_len, head_dim].
        density: most that a head may compute, of the causal units; where nothing is that cheap, the cheapest wins.

    Returns:
        int64 [num_heads, 3], rows of `choices`, on the CPU.
    """
    wanted, _ = dense_attention(chunk, values)
    best = torch.full((chunk.num_heads,), float("inf"), device=wanted.device)
    table = torch.zeros(chunk.num_heads, 3, dtype=torch.int64)
    for choice in choices:
        plan = plan_heads(chunk, torch.tensor(choice).expand(chunk.num_heads, 3))
        cost = plan.density().expand(chunk.num_heads)
        error = torch.full_like(best, float("inf"))
        if bool((cost <= density).any()):  # else what it attends doesn't matter
            error = (sparse_attention(chunk, values, plan)[0] - wanted).square().mean((0, 2))
        # Beyond any error, ordered by cost: taken only while nothing within the density was seen.
        error = torch.where(cost <= density, error, (wanted.square().mean() + 1) * 1e6 * (1 + cost))
        better = error < best
        best = torch.where(better, error, best)
        table[better.cpu()] = torch.tensor(choice)
    return table
