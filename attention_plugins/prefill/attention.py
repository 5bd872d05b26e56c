"""The executor's naive twin: exact attention over what a plan holds, in plain torch and float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attention_plugins.prefill.base import Chunk, Pattern, Plan, Reader, read
from attention_plugins.prefill.grid import ROWS

Part = tuple[torch.Tensor, torch.Tensor]
"""Output float32 [rows, num_heads, head_dim], and log denominators (natural), float32 [rows, num_heads]."""


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, scale: float) -> Part:
    """Softmax attention over the keys that are seen; a row that sees none gets zeros and -inf.

    Args:
        queries: [rows, num_heads, head_dim].
        keys, values: [num_kv_heads, n, head_dim].
        seen: bool, broadcasts to [num_heads, rows, n].
    """
    group = queries.shape[1] // keys.shape[0]
    keys, values = (tensor.float().repeat_interleave(group, 0) for tensor in (keys, values))
    logits = (queries.float().transpose(0, 1) @ keys.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    return (weights @ values).transpose(0, 1), lse.transpose(0, 1)


def sparse_attention(chunk: Chunk, values: torch.Tensor | Reader, plan: Plan) -> Part:
    """Attention of a chunk over its plan, causal, one block of queries at a time.

    Args:
        values: [num_kv_heads, k_len, head_dim], or what reads them.
    """
    parts = []
    mask = plan.mask.repeat_interleave(chunk.num_heads // len(plan.mask), 0)
    for block in range(plan.grid.q_blocks):
        queries = chunk.queries[block * ROWS : (block + 1) * ROWS]
        first = chunk.offset + block * ROWS
        last = first + len(queries)
        positions = torch.arange(last, device=queries.device)
        seen = mask[:, block].repeat_interleave(plan.grid.unit, -1)[:, None, :last] & (
            positions <= positions[first:, None]
        )
        parts.append(attend(queries, read(chunk.keys, 0, last), read(values, 0, last), seen, chunk.scale))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def dense_rows(chunk: Chunk, values: torch.Tensor | Reader, rows: torch.Tensor) -> torch.Tensor:
    """Dense attention of some of a chunk's queries: int64 [m] -> float32 [m, num_heads, head_dim]."""
    keys, positions = read(chunk.keys, 0, chunk.k_len), torch.arange(chunk.k_len, device=rows.device)
    seen = positions <= (chunk.offset + rows)[:, None]
    return attend(chunk.queries[rows], keys, read(values, 0, chunk.k_len), seen, chunk.scale)[0]


def dense_attention(chunk: Chunk, values: torch.Tensor | Reader) -> Part:
    """The reference: every query sees every key up to its own."""
    return sparse_attention(chunk, values, Plan.full(chunk))


def merge(parts: Sequence[Part]) -> Part:
    """Attention over several disjoint sets of keys, from the attention over each."""
    lses = torch.stack([lse for _, lse in parts])
    lse = lses.logsumexp(0)
    weights = (lses - lse.masked_fill(lse == float("-inf"), 0.0)).exp()
    return (torch.stack([out for out, _ in parts]) * weights[..., None]).sum(0), lse


def run(
    pattern: Pattern, chunk: Chunk, values: torch.Tensor | Reader, carry: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A chunk's attention by a pattern, from plan to correction.

    Returns:
        float32 [q_len, num_heads, head_dim], and the next chunk's `carry`.
    """
    plan = pattern.planned(chunk)
    out, _ = sparse_attention(chunk, values, plan)
    return pattern.correct(chunk, values, plan, out, carry, dense_rows)
