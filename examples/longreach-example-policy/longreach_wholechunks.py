"""Whole chunks by SnapKV's votes: ChunkKV's idea (arXiv 2502.00299)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field

from kvcache.evidence import Evidence, LayerEvidence
from kvcache.policies.base import Policy, PolicyArgs
from kvcache.scorers import window_votes


class WholeChunks(Policy):
    """Chunks of `chunk` tokens stay or go together, by the mean vote that the last queries give to their tokens.

    Words keep their neighbours, so that a fact isn't torn. The budget's last chunk is cut where the budget ends.
    """

    name = "wholechunks"
    title = "Whole chunks by SnapKV's votes"
    paper = "arXiv 2502.00299"
    evidence = Evidence.WINDOW_QUERIES
    query_aware = True

    class Args(PolicyArgs):
        window: int = Field(32, ge=1, le=1024, description="Last queries that vote; these tokens always stay.")
        chunk: int = Field(20, ge=1, le=256, description="Tokens that stay or go together.")

    @property
    def recent(self) -> int:
        return int(self.args.window)

    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        votes = window_votes(evidence, pooling="none", group_reduce="max")
        chunk = self.args.chunk
        means = F.avg_pool1d(votes, chunk, chunk, ceil_mode=True)  # the last chunk's mean is over what it has
        spread = means.repeat_interleave(chunk, -1)[:, : votes.shape[-1]]
        return F.pad(spread, (0, self.args.window), value=float("inf"))
