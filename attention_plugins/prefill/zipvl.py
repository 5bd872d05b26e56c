"""ZipVL's token selection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field

from attention_plugins.prefill.base import Chunk, Pattern, PatternArgs, Plan
from attention_plugins.prefill.bigbird import mixed
from attention_plugins.prefill.choose import ROUNDING, top

RANDOM, RECENT = 64, 64
"""Queries that are asked, spread over the chunk and at its end: the paper's counts from memory, not verified."""


class ZipVL(Pattern):
    """A layer computes attention to the fewest tokens that hold `tau` of the attention of some probing queries.

    The probes are the last 64 queries and 64 spread over the chunk. How many tokens: the largest sums of their
    attention that reach `tau` together. Which: those with the largest mean attention over the probes that can see them.
    All heads share the tokens; that isn't verified, nor is the default of `tau`.

    Made for images and video. Other than published, every query is computed (there, unimportant tokens get no attention
    output in a layer), queries also see their last `window` tokens, and the cache is kept as it is. Tokens are rounded
    to units of the cache, so more is computed than `tau` asks for.

    Chunks: the probes are each chunk's own, so the mask depends on where the prompt was cut.

    Formula:
        p = min{p : sum of the p largest a_j >= tau * sum a}, a_j = sum over probes and heads of A_ij; ranked by a_j /
        #probes i >= j.
    """

    name = "zipvl"
    title = "ZipVL: the tokens that hold most of the attention"
    paper = "arXiv 2410.08584"
    per_kv_head = True

    class Args(PatternArgs):
        tau: float = Field(0.975, gt=0, le=1, description="Share of the probes' attention that is computed.")
        window: int = Field(256, ge=1, description="Last tokens that every query sees.")

    args: Args

    def plan(self, chunk: Chunk) -> Plan:
        rows = probes(chunk)
        mass = chunk.ops.column_sums(chunk, rows).sum(0)
        positions = torch.arange(chunk.k_len, device=rows.device)
        seen_by = len(rows) - torch.searchsorted(chunk.offset + rows, positions)
        tokens = important(mass, mass / seen_by, self.args.tau, chunk.ops.top)
        mask = chunk.grid.from_tokens(tokens) | chunk.grid.band(0, self.args.window)
        return Plan.forced(mask, chunk.grid, chunk.num_kv_heads)


def important(
    mass: torch.Tensor,
    order: torch.Tensor,
    tau: float,
    highest: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = top,
) -> torch.Tensor:
    """So many tokens as reach `tau` of the mass, the first by `order`; all, where some mass isn't a number.

    Args:
        mass, order: float32 [n].
        highest: see `attention_plugins.prefill.choose.top`.

    Returns:
        bool [n].
    """
    if tau >= 1:
        return torch.ones_like(mass, dtype=torch.bool)
    sums = mass.sort(descending=True).values.cumsum(0)
    count = (sums < (tau - ROUNDING) * mass.sum()).sum() + 1
    return highest(order[None], count.view(1, 1))[0] | mass.isnan().any()


def probes(chunk: Chunk) -> torch.Tensor:
    """The queries that are asked, int64 [m], ascending, from the chunk's start: the same in every run."""
    device = chunk.queries.device
    rest = chunk.q_len - RECENT
    if rest <= RANDOM:
        return torch.arange(chunk.q_len, device=device)
    strata = torch.arange(RANDOM + 1, device=device) * rest // RANDOM
    drawn = strata[:-1] + mixed(strata[:-1] + 1) % strata.diff()
    return torch.cat([drawn, torch.arange(rest, chunk.q_len, device=device)])
