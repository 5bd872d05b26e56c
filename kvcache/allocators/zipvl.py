"""ZipVL's ratio."""

from __future__ import annotations

import torch
from pydantic import Field

from kvcache.allocators.base import LayerAllocator
from kvcache.allocators.zigzag import tokens_for_mass
from kvcache.evidence import Evidence, LayerEvidence
from kvcache.method import Arguments


class ZipVLLayers(LayerAllocator):
    """Each layer gets tokens in proportion to the fewest whose summed attention reaches `tau`.

    One set for all heads of a layer, as the description has it (head handling is not verified). The paper fixes no
    budget; here its numbers of tokens are shares of one, since a request's memory is known before its prompt has run.
    The attention is the observation window's; the paper also probes random queries.

    Formula:
        c(l) = the fewest j whose p_j sum to `tau` of all; p_j = mean over query heads h of zigzag's p_h,j
        tokens(l) = budget * layers * c(l) / sum of c
    """

    name = "zipvl"
    title = "ZipVL: by the fewest tokens that hold the attention"
    paper = "arXiv 2410.08584"
    evidence = Evidence.WINDOW_QUERIES

    class Args(Arguments):
        window: int = Field(32, ge=1, le=1024, description="Last queries that vote.")
        tau: float = Field(0.975, gt=0, le=1, description="Attention that a layer's tokens should hold.")

    def statistic(self, evidence: LayerEvidence) -> torch.Tensor:
        return tokens_for_mass(evidence.window_attention.mean(0), self.args.tau).double()

    def shares(
        self, num_layers: int, budget: int, prompt_len: int, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert statistics is not None
        return budget * num_layers * statistics / statistics.sum()
