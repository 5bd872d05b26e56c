"""HiP Attention."""

from __future__ import annotations

import torch
from pydantic import Field

from attention_plugins.prefill.base import Chunk, Pattern, PatternArgs, Plan
from attention_plugins.prefill.grid import ROWS

CHUNK, MIDDLE = 256, 32
"""Tokens of a chunk in the first and the second stage; in the last it is a unit of the cache."""


class HiP(Pattern):
    """Searches the context from coarse to fine: each stage keeps the chunks whose best token scores highest.

    Within a chunk a binary search finds that token: of two halves the one whose middle token scores higher is searched
    on. A token counts by its largest product with the block's queries (every `q_stride`-th of them). Survivors are cut
    into smaller chunks and searched again. The search is exact where scores rise or fall along a chunk; a lone spike
    can be missed.

    The list is shared by all heads of a layer, the largest score counts, or by the query heads of a KV head
    (`share_heads` false). With tensor parallelism, the heads of each GPU share one. This is the later version
    (InfiniteHiP's three stages), not the first paper's tree; its stretched positions and its lists that are kept for
    later steps are left out. The last stage ends at the cache's unit (8 tokens there), and a block has 128 queries (64
    there).

    Formula:
        score_j = max over heads and the block's queries of q k_j, 2 log2(chunk) tokens looked at per chunk; chunks of
        256, then 32, then a unit, the best for first_tokens, second_tokens, tokens.
    """

    name = "hip"
    title = "HiP: a hierarchical search for the best tokens"
    paper = "arXiv 2406.09827, 2502.08910"
    per_kv_head = True
    chunk_exact = True

    class Args(PatternArgs):
        min_context: int = Field(32768, ge=0, description="Chunks that see fewer tokens are attended densely.")
        dense_layers: int = Field(3, ge=0, description="First layers, which are attended densely.")
        sinks: int = Field(256, ge=1, description="First tokens that every query sees.")
        window: int = Field(1024, ge=CHUNK, description="Last tokens that every query sees.")
        first_tokens: int = Field(32768, ge=CHUNK, description="Tokens that the first stage leaves, of chunks of 256.")
        second_tokens: int = Field(8192, ge=MIDDLE, description="Tokens that the second stage leaves, of chunks of 32.")
        tokens: int = Field(2048, ge=ROWS, description="Tokens that are attended to, beside sinks and window.")
        q_stride: int = Field(4, ge=1, le=ROWS, description="One of so many queries takes part in the search.")
        share_heads: bool = Field(True, description="Whether all heads of a layer share a list.")

    args: Args

    def plan(self, chunk: Chunk) -> Plan:
        grid = chunk.grid
        heads = 1 if self.args.share_heads else chunk.num_kv_heads
        starts = torch.arange(0, grid.k_len, CHUNK, device=grid.device).expand(heads, grid.q_blocks, -1)
        # Chunks reach into the window at most: it is no shorter than a chunk.
        valid = (starts + CHUNK > self.args.sinks) & (starts < grid.first_rows[:, None] - self.args.window)
        unknown = torch.zeros(heads, grid.q_blocks, 1, dtype=torch.bool, device=grid.device)
        before = CHUNK
        for size, tokens in self.stages(grid.unit):
            parts = torch.arange(0, before, size, device=grid.device)
            starts, valid = (starts[..., None] + parts).flatten(2), valid.repeat_interleave(len(parts), -1)
            scores = chunk.ops.best_of_chunks(chunk, starts, size, self.args.q_stride, self.args.share_heads)
            unknown |= (scores.isnan() & valid).any(-1, keepdim=True)
            scores = scores.nan_to_num(nan=float("inf")).masked_fill(~valid, float("-inf"))
            kept = scores.sort(dim=-1, descending=True, stable=True).indices[..., : max(1, tokens // size)]
            starts, valid, before = starts.gather(-1, kept), valid.gather(-1, kept), size
        # What isn't valid may lie behind the last unit; no valid one is the last, which holds the block's own tokens.
        units = (starts // grid.unit).clamp(max=grid.k_units - 1)
        mask = torch.zeros(heads, grid.q_blocks, grid.k_units, dtype=torch.bool, device=grid.device)
        mask = mask.scatter_(-1, units, valid) | unknown | grid.band(self.args.sinks, self.args.window)
        return Plan.forced(mask, grid, chunk.num_kv_heads)

    def stages(self, unit: int) -> list[tuple[int, int]]:
        """Sizes of the chunks that are searched, and how many tokens they keep."""
        middle = [(MIDDLE, self.args.second_tokens)] if unit < MIDDLE else []
        return [(CHUNK, self.args.first_tokens), *middle, (unit, self.args.tokens)]
