"""ObservedAttention."""

from __future__ import annotations

import torch
from pydantic import Field

from kvcache.evidence import Evidence, LayerEvidence
from kvcache.policies.base import Policy, PolicyArgs


class ObservedAttention(Policy):
    """Keep the tokens that got the most attention from each query that could see them.

    H2O's sums of attention, divided by the number of queries behind a token, so that old tokens have no advantage:
    kvpress' one-shot form of H2O, with its mean over the query heads of a KV head. A token near the end is judged by
    few queries, itself among them; kvpress forces none (`recent: 0, sinks: 0`).

    Sums take a second pass over all queries and keys, which grows with the square of the prompt, and no prompt starts
    from the prefix cache.

    Formula:
        score_j = s_j / (n - j), s_j as h2o's score, j = 0 ... n - 1
    """

    name = "observedattention"
    title = "ObservedAttention: mean attention received"
    paper = "arXiv 2306.14048 (H2O), as in NVIDIA/kvpress"
    evidence = Evidence.COLUMN_SUMS
    query_aware = True

    class Args(PolicyArgs):
        recent: int = Field(32, ge=0, le=4096, description="Last tokens of the prompt that always stay.")

    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        queries = torch.arange(evidence.shape[1], 0, -1, device=evidence.device)
        return evidence.column_sums / queries
