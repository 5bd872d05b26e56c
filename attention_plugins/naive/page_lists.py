"""Page lists of a plan: what an attention kernel reads for each head and block of queries."""

from __future__ import annotations

import torch

from attention_plugins.prefill.base import Plan


def page_lists(
    plan: Plan,
    table: torch.Tensor,
    heads: tuple[int, int] | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pages that each block of queries reads, in ascending order of the context: a sequence for each (head, block).

    A head's sequences follow each other: sequence `head * q_blocks + block`, heads counted from `heads[0]`. Pages are
    units of the plan; a sequence's last one is always that of the block's last row, so a causal mask aligned to the end
    is right.

    Args:
        plan: whose units are pages; its heads are KV heads, or query heads, of which as many share a KV head.
        table: int64 [num_kv_heads, blocks], the pages of the context; at least `k_units` blocks.
        heads: the plan's heads from the first up to, without, the second; all by default.
        out: where to write; by default a new place.

    Returns:
        tables: int32 [heads * q_blocks, k_units or more], entries behind a sequence's pages aren't written.
        lengths: int32 [heads * q_blocks], tokens.
    """
    grid, (first, last) = plan.grid, heads or (0, len(plan.mask))
    tables, lengths = out or empty_lists(plan, last - first)
    group = len(plan.mask) // len(table)
    for head in range(first, last):
        for block, last_row in enumerate(grid.last_rows.tolist()):
            units = plan.mask[head, block].nonzero().flatten()
            row = (head - first) * grid.q_blocks + block
            tables[row, : len(units)] = table[head // group, units].int()
            lengths[row] = (len(units) - 1) * grid.unit + last_row % grid.unit + 1
    return tables, lengths


def empty_lists(plan: Plan, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the lists of so many heads of the plan."""
    rows, device = heads * plan.grid.q_blocks, plan.mask.device
    return (
        torch.empty(rows, plan.grid.k_units, dtype=torch.int32, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
    )
