"""Sinks and a window."""

from __future__ import annotations

from pydantic import Field

from attention_plugins.prefill.base import Chunk, Pattern, PatternArgs, Plan


class Streaming(Pattern):
    """Every query sees the first `sinks` tokens and the last `window` before it.

    The cheapest pattern, and blind to what lies between: on its own it loses most of what a long prompt says; it is
    meant as the base of `delta`. Sinks and window are rounded to units of the cache, the window to the first row of
    each block of 128 queries, so later rows see more. The default sizes are those that Delta Attention was published
    with.

    Formula:
        query i sees j with j < sinks or i - j < window.
    """

    name = "streaming"
    title = "StreamingLLM's mask: sinks and a sliding window"
    paper = "arXiv 2309.17453"
    per_kv_head = True
    chunk_exact = True

    class Args(PatternArgs):
        sinks: int = Field(1024, ge=0, description="First tokens that every query sees.")
        window: int = Field(2048, ge=1, description="Last tokens that every query sees, its own included.")

    args: Args

    def plan(self, chunk: Chunk) -> Plan:
        return Plan.forced(chunk.grid.band(self.args.sinks, self.args.window), chunk.grid, chunk.num_kv_heads)
