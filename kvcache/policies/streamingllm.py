"""StreamingLLM."""

from __future__ import annotations

import torch

from kvcache.evidence import LayerEvidence
from kvcache.policies.base import Policy


class StreamingLLM(Policy):
    """Keep the first `sinks` tokens and the last ones up to the budget.

    Kept keys keep their original RoPE positions, as in kvpress; the paper's code re-numbers them inside the cache.
    The floor of every comparison: cheap, steady, and blind to what lies between.

    Formula:
        score_j = j
    """

    name = "streamingllm"
    title = "StreamingLLM: attention sinks and a recent window"
    paper = "arXiv 2309.17453"
    heads_alone = True

    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        num_kv_heads, prompt_len, _ = evidence.shape
        positions = torch.arange(prompt_len, dtype=torch.float32, device=evidence.device)
        return positions.expand(num_kv_heads, prompt_len)
