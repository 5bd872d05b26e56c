"""PowerAttention."""

from __future__ import annotations

import torch
from pydantic import Field

from attention_plugins.prefill.base import Chunk, Pattern, PatternArgs, Plan

BLOCK = 256


class Power(Pattern):
    """Every block of 256 sees the sink, a short window, and the blocks at distances 1, 2, 4, 8, ...

    What a token can learn of grows exponentially with depth, for models trained with this mask; others lose what lies
    at the distances between. The same for all heads and layers. The paper keeps some layers dense (`dense_layers` does
    so for the first ones only). Written from a description; the paper's code wasn't read.

    Formula:
        block i sees j with j = 0, i - j < window, or i - j a power of two.
    """

    name = "power"
    title = "PowerAttention: blocks at power-of-two distances"
    paper = "arXiv 2503.03588"
    needs_training = True
    per_kv_head = True
    chunk_exact = True

    class Args(PatternArgs):
        window: int = Field(5, ge=1, description="Blocks of 256 tokens in the window, the query's own included.")

    args: Args

    def plan(self, chunk: Chunk) -> Plan:
        def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            distance = query - key
            return (key == 0) | (distance < self.args.window) | (distance & (distance - 1) == 0)

        return Plan.forced(chunk.grid.from_rule(BLOCK, sees), chunk.grid, chunk.num_kv_heads)
