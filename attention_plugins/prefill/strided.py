"""S2-Attention (DKernel)."""

from __future__ import annotations

import torch
from pydantic import Field

from attention_plugins.prefill.base import Chunk, Pattern, PatternArgs, Plan

BLOCK = 64


class Strided(Pattern):
    """Every head sees a window, and every `stride`-th block before it; together the heads see everything.

    Heads start their strides one after the other, spread over the stride where there are fewer. Columns are absolute:
    what a head skips behind its window, it never reads again. For models trained with it (Phi-3-small was, with its own
    sizes). Sharded by KV head, as in the authors' code for grouped queries. With tensor parallelism each GPU counts its
    own heads from 0, so heads of different GPUs share shards.

    Formula:
        head h sees block j of 64 if i - j < local or (j + h * max(1, stride // heads)) % stride == 0.
    """

    name = "strided"
    title = "S2-Attention: a shard of the context for each head"
    paper = "arXiv 2407.17678"
    needs_training = True
    per_kv_head = True
    chunk_exact = True

    class Args(PatternArgs):
        local: int = Field(32, ge=1, description="Blocks of 64 tokens in the window, the query's own included.")
        stride: int = Field(8, ge=1, description="Of so many blocks behind the window, a head sees one.")
        dense_heads: int = Field(0, ge=0, description="Last KV heads that see everything.")

    args: Args

    def plan(self, chunk: Chunk) -> Plan:
        heads = torch.arange(chunk.num_kv_heads, device=chunk.queries.device)[:, None, None]
        step = max(1, self.args.stride // chunk.num_kv_heads)

        def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            shard = (key + heads * step) % self.args.stride == 0
            return shard | (query - key < self.args.local) | (heads >= chunk.num_kv_heads - self.args.dense_heads)

        return Plan.forced(chunk.grid.from_rule(BLOCK, sees), chunk.grid)
