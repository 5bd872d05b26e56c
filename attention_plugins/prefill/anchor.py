"""AnchorAttention."""

from __future__ import annotations

import torch
from pydantic import Field

from attention_plugins.prefill.base import Chunk, Pattern, PatternArgs, Plan
from attention_plugins.prefill.grid import ROWS


class Anchor(Pattern):
    """A key is computed if it comes within `theta` of the largest logit among the sink and the near tokens.

    That largest logit, the anchor, is exact for every query; it is averaged over blocks of 128 queries, as the queries
    are. Of a group of `step` blocks, a key needs to come near one block's anchor to be computed for all of them. Near
    tokens are those from the group's start on. The paper gathers single keys; here the units that hold one are computed
    whole, which computes more, and nothing less.

    `theta` is in natural units: the paper's 12 is log2 in its Triton code, which is 8.3 here, and natural in its torch
    code.

    Chunks: groups are counted from the prompt's start. Chunks that are a multiple of `128 step` tokens long give the
    same mask as the whole prompt; others leave groups open, whose halves then choose for themselves.

    Formula:
        unit u is computed for a group if max over its blocks b, keys j of mean(q_b) k_j / sqrt d + theta >= mean over
        rows of max over sink and near keys of q k / sqrt d.
    """

    name = "anchor"
    title = "AnchorAttention: keys within reach of a row's maximum"
    paper = "arXiv 2505.23520"

    class Args(PatternArgs):
        theta: float = Field(8.3, description="How far below the anchor a logit may be; natural units.")
        step: int = Field(16, ge=1, description="Blocks of 128 queries that share their keys.")

    args: Args

    def plan(self, chunk: Chunk) -> Plan:
        # Not "at least 0", so that NaN is kept.
        return chunk.ops.group_plan(chunk, ~(self.slack(chunk) + self.args.theta < 0), self.span)

    def slack(self, chunk: Chunk) -> torch.Tensor:
        """Largest mean logit of each unit, less the anchor: float32 [num_heads, groups, k_units]; see `group_slack`."""
        return chunk.ops.group_slack(chunk, chunk.ops.near_maxima(chunk, self.span), self.span)

    @property
    def span(self) -> int:
        """Tokens of a group."""
        return self.args.step * ROWS
