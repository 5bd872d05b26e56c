"""KeyDiff."""

from __future__ import annotations

import torch
from pydantic import Field
from torch.nn.functional import normalize

from kvcache.evidence import Evidence, LayerEvidence
from kvcache.policies.base import Policy, PolicyArgs


class KeyDiff(Policy):
    """Keep the keys least similar to their head's mean direction: they are the ones that stand out.

    Needs keys alone, so it doesn't know the question. The anchor is the mean of the unit keys of the whole prompt.

    Formula:
        a = mean over j of k_j / |k_j|
        score_j = -cos(k_j, a)
    """

    name = "keydiff"
    title = "KeyDiff: unlike keys stay"
    paper = "arXiv 2504.15364"
    heads_alone = True
    evidence = Evidence.KEYS

    class Args(PolicyArgs):
        recent: int = Field(32, ge=0, le=4096, description="Last tokens of the prompt that always stay.")

    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        unit = normalize(evidence.keys.float(), dim=-1)
        anchor = normalize(unit.mean(1, keepdim=True), dim=-1)
        return -(unit * anchor).sum(-1)
