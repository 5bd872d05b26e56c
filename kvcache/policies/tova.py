"""TOVA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field

from kvcache.evidence import Evidence, LayerEvidence
from kvcache.policies.base import Policy, PolicyArgs


class TOVA(Policy):
    """Keep what the prompt's last token attends to, averaged over all heads of a layer.

    All heads of a layer keep the same tokens, as in the paper (with several GPUs, all heads of one GPU). The paper
    evicts one token at every step of the answer too; here the prompt is compressed once. The paper forces no sinks
    (`sinks: 0`): it finds them kept by themselves.

    Formula:
        score_j = mean over all query heads of the layer and the last `window` queries q of softmax_j(q . k_j)
    """

    name = "tova"
    title = "TOVA: the last token's attention"
    paper = "arXiv 2401.06104"
    evidence = Evidence.WINDOW_QUERIES
    query_aware = True

    class Args(PolicyArgs):
        window: int = Field(1, ge=1, le=1024, description="Last queries that vote; 1 in the paper. They always stay.")

    @property
    def recent(self) -> int:
        return int(self.args.window)

    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        votes = evidence.window_attention.mean(0).expand(evidence.shape[0], -1)
        return F.pad(votes, (0, evidence.shape[1] - votes.shape[-1]), value=float("inf"))
