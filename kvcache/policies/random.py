"""Random selection: the control that every policy has to beat."""

from __future__ import annotations

import torch
from pydantic import Field

from kvcache.evidence import LayerEvidence
from kvcache.policies.base import Policy, PolicyArgs


class Random(Policy):
    """Keep random tokens, each KV head its own; a control, not for use.

    The choice depends on `seed`, layer, heads and prompt length alone, so a request repeats exactly.

    Formula:
        score_j = uniform in 0 ... 1, by `seed`, layer, head and prompt length
    """

    name = "random"
    title = "Random tokens: a control"
    paper = "none"

    class Args(PolicyArgs):
        recent: int = Field(32, ge=0, le=4096, description="Last tokens of the prompt that always stay.")
        seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of the choice.")

    args: Args

    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        num_kv_heads, prompt_len, _ = evidence.shape
        generator = torch.Generator().manual_seed(self.args.seed * 1009 + evidence.layer)
        return torch.rand(num_kv_heads, prompt_len, generator=generator).to(evidence.device)
