"""BigBird."""

from __future__ import annotations

import torch
from pydantic import Field

from attention_plugins.prefill.base import Chunk, Pattern, PatternArgs, Plan

BLOCK = 64
MULTIPLIER = 6364136223846793005
"""Knuth's, of MMIX's random numbers. Products wrap around at 64 bits."""


def mixed(number: torch.Tensor) -> torch.Tensor:
    """A number that looks random, >= 0, the same on every device and for every chunk: int64, elementwise."""
    number = (number ^ (number >> 31)) * MULTIPLIER
    number = (number ^ (number >> 29)) * MULTIPLIER
    return (number ^ (number >> 32)) & 0x7FFFFFFF


class BigBird(Pattern):
    """Every block of 64 sees the first blocks, a window, and a few random blocks before it.

    Drawn by layer, KV head and block from a fixed seed, so they are the same in every request; draws may coincide.
    Published for encoders, whose window has two sides and whose global tokens are seen from and see everywhere: this is
    the causal half of it, which nobody has shown to work for decoders. Sizes as usually quoted; not verified.

    Formula:
        block i sees j with j < globals, i - j < window, or j among random draws from 0..i.
    """

    name = "bigbird"
    title = "BigBird: global, window and random blocks"
    paper = "arXiv 2007.14062"
    needs_training = True
    per_kv_head = True
    chunk_exact = True

    class Args(PatternArgs):
        globals: int = Field(2, ge=1, description="First blocks of 64 tokens, which all see.")
        window: int = Field(3, ge=1, description="Blocks in the window, the query's own included.")
        random: int = Field(3, ge=0, le=64, description="Random blocks of each block of queries.")
        seed: int = Field(0, ge=0, le=2**31 - 1, description="Of the draws.")

    args: Args

    def plan(self, chunk: Chunk) -> Plan:
        heads = torch.arange(chunk.num_kv_heads, device=chunk.queries.device)[:, None, None]
        stream = mixed(mixed(heads + (chunk.layer << 20)) + self.args.seed)

        def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            seen = (key < self.args.globals) | (query - key < self.args.window)
            for draw in range(self.args.random):
                seen = seen | (key == mixed(stream + mixed((query << 8) + draw)) % (query + 1))
            return seen

        return Plan.forced(chunk.grid.from_rule(BLOCK, sees), chunk.grid, chunk.num_kv_heads)
