"""The L2-norm strategy."""

from __future__ import annotations

import torch
from pydantic import Field

from kvcache.evidence import Evidence, LayerEvidence
from kvcache.policies.base import Policy, PolicyArgs


class L2Norm(Policy):
    """Keep the keys with the smallest L2 norm: they receive the most attention.

    Needs no queries, so it is the cheapest scorer with any content. RoPE doesn't change norms. The paper's code
    has no recency guard and leaves the first layers whole in some runs; here `recent` tokens are forced (set 0 for
    the paper's rule) and every layer is compressed.

    Formula:
        score_j = -|k_j|
    """

    name = "l2norm"
    title = "L2-norm strategy: low-norm keys stay"
    paper = "arXiv 2406.11430"
    heads_alone = True
    evidence = Evidence.KEYS

    class Args(PolicyArgs):
        recent: int = Field(32, ge=0, le=4096, description="Last tokens of the prompt that always stay.")

    args: Args

    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        return -torch.linalg.vector_norm(evidence.keys, dim=-1, dtype=torch.float32)
