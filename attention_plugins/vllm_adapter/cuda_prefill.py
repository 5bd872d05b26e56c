"""Plans on FlashAttention: every (head, block of queries) is a sequence whose page table lists what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from attention_plugins.prefill.attention import merge
from attention_plugins.prefill.base import Chunk, Plan
from attention_plugins.prefill.grid import ROWS, Grid
from attention_plugins.prefill.paged import PagedTokens
from attention_plugins.vllm_adapter.prefilling import Tokens

TABLE_ENTRIES = 1 << 24
"""Most entries of the page tables that exist at a time (64 MiB); heads are attended in several rounds where they need
more."""
MULTIPROCESSORS = 132
"""Of an H100; elsewhere sequences are split a little too seldom or too often."""
BYTES_PER_PAIR = 8
"""Memory set aside for each (head, block of queries, unit of keys): masks, and what they are made from."""


class FlashExecutor:
    """`attention_plugins.vllm_adapter.prefilling.Executor`.

    The causal mask of FlashAttention is aligned to the end of keys and queries. A list ends with the pages of its
    block's own tokens and is as long as up to its last query, so every query sees its own part of them, and all that is
    listed before.
    """

    def __init__(self, layers: Sequence[Any], ops: ModuleType, estimators: ModuleType) -> None:
        """
        Args:
            layers: of the model, in order.
            ops: `attention_plugins.naive` or `attention_plugins.kernels`.
            estimators: see `Executor`.
        """
        self.layers, self.ops, self.estimators = layers, ops, estimators

    def attend(self, queries: torch.Tensor, chunk: Chunk, values: Tokens, plan: Plan) -> torch.Tensor:
        assert isinstance(chunk.keys, PagedTokens)
        layer, grid, heads = self.layers[chunk.layer], plan.grid, len(plan.mask)
        flat = queries.unflatten(1, (heads, -1)).transpose(0, 1).contiguous()  # [heads, q_len, group, head_dim]
        out = torch.empty(flat.shape, dtype=chunk.queries.dtype, device=flat.device)
        least = max(1, TABLE_ENTRIES // (grid.q_blocks * grid.k_units))
        for first in range(0, heads, least):
            last = min(first + least, heads)
            pages, lengths = self.ops.page_lists(plan, chunk.keys.table, (first, last))
            layer.impl.flash(
                layer,
                flat[first:last].flatten(0, 1),
                pages,
                lengths,
                out=out[first:last].flatten(0, 1),
                max_seqlen_q=min(ROWS, grid.q_len),
                cu_seqlens_q=_starts(last - first, grid),
                causal=True,
                num_splits=self._num_splits(layer, len(lengths) * flat.shape[2]),
            )
        return out.transpose(0, 1).flatten(1, 2)

    def dense_rows(self, queries: torch.Tensor, chunk: Chunk, values: Tokens, rows: torch.Tensor) -> torch.Tensor:
        """All rows see what lies before the chunk: one sequence per KV head. Of the chunk itself each sees another
        part: one sequence per row and KV head. Two parts that are merged by their denominators."""
        assert isinstance(chunk.keys, PagedTokens)
        layer, unit, kv_heads = self.layers[chunk.layer], chunk.unit, chunk.num_kv_heads
        before, device = chunk.offset // unit, rows.device  # whole pages that all rows see
        table = chunk.keys.table.int()
        grouped = queries[rows].unflatten(1, (kv_heads, -1))  # [m, num_kv_heads, group, head_dim]
        m = len(rows)
        own = table[:, before:].expand(m, -1, -1).flatten(0, 1).contiguous()
        lengths = (chunk.offset - before * unit + 1 + rows).int().repeat_interleave(kv_heads)
        parts = [self._part(layer, grouped.flatten(0, 1), own, lengths, 1)]
        if before:
            first = table[:, :before].contiguous()
            lengths = torch.full((kv_heads,), before * unit, dtype=torch.int32, device=device)
            out, lse = self._part(layer, grouped.transpose(0, 1).flatten(0, 1), first, lengths, m)
            parts.append((_by_row(out, m), _by_row(lse, m)))
        shaped = [(out.unflatten(0, (m, kv_heads)), lse.unflatten(0, (m, kv_heads))) for out, lse in parts]
        return merge([(out.float(), lse) for out, lse in shaped])[0].flatten(1, 2)

    def _part(
        self, layer: Any, queries: torch.Tensor, pages: torch.Tensor, lengths: torch.Tensor, q_len: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of sequences of `q_len` queries to all their keys: [tokens, group, head_dim] -> the same shape, and
        log denominators [tokens, group]."""
        starts = torch.arange(0, len(queries) + 1, q_len, dtype=torch.int32, device=queries.device)
        out, lse = layer.impl.flash(
            layer,
            queries.contiguous(),
            pages,
            lengths,
            max_seqlen_q=q_len,
            cu_seqlens_q=starts,
            causal=False,
            num_splits=self._num_splits(layer, len(lengths)),
            return_softmax_lse=True,
        )
        return out, lse.T

    def _num_splits(self, layer: Any, tiles: int) -> int:
        """0: FlashAttention chooses. Prompts aren't in CUDA graphs, so it can. Where there is work for every
        multiprocessor it doesn't get to: each split takes memory for all outputs."""
        alone = layer.impl.batch_invariant_enabled or layer.impl.vllm_flash_attn_version != 3
        return 1 if alone or tiles > 2 * MULTIPROCESSORS else 0


def nbytes(num_heads: int, most_tokens: int, max_model_len: int, page_size: int) -> int:
    """Memory of a chunk's masks and page tables.

    Args:
        most_tokens: of a step.
    """
    pairs = num_heads * -(-min(most_tokens, max_model_len) // ROWS) * -(-max_model_len // page_size)
    return 4 * min(pairs, TABLE_ENTRIES) + BYTES_PER_PAIR * pairs


def _starts(heads: int, grid: Grid) -> torch.Tensor:
    """Where each sequence's queries begin, head by head: int32 [heads * q_blocks + 1]."""
    blocks = grid.first_rows - grid.offset
    starts = torch.arange(heads, device=grid.device)[:, None] * grid.q_len + blocks
    return torch.cat([starts.flatten(), starts.new_full((1,), heads * grid.q_len)]).int()


def _by_row(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """From KV head by KV head to row by row: [num_kv_heads * rows, ...] -> [rows * num_kv_heads, ...]."""
    return tensor.unflatten(0, (-1, rows)).transpose(0, 1).flatten(0, 1)
