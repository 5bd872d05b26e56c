"""Expected Attention."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from kvcache.evidence import Evidence, LayerEvidence
from kvcache.observers.moments import QueryMoments
from kvcache.policies.base import Policy, PolicyArgs

# Bounds the memory of scoring a KV head: its keys once more for each of its query heads, 4 bytes a number.
_MAX_ELEMENTS = 1 << 24


class ExpectedAttention(Policy):
    """Keep what queries to come are expected to attend to, going by the mean and covariance of the prompt's.

    Queries before RoPE are taken for Gaussian; rotated by the mean rotation of the next `future` positions they give
    each key an expected `exp(logit)` in closed form. Its softmax over the prompt behind the sinks, averaged over the
    query heads of a KV head and weighted by the length of the value, is the score. It needs no question at the end of
    the prompt. All queries but the first four are looked at, so the prefix cache saves such a request nothing, and
    models whose rotation of positions can't be undone are refused. The paper forces no recent tokens (`recent: 0`);
    kvpress has `epsilon: 0`, a floor was measured 1.5 to 2 points better.

    Formula:
        m, S = mean and covariance of a query head's queries before RoPE, positions 4 ... n - 1
        R = mean rotation of positions n ... n + future - 1;  m' = R m, S' = R S R^T
        z_j = m' . k_j * scale + k_j^T S' k_j * scale^2 / 2
        score_j = (epsilon + mean over query heads of softmax_j(z_j), sinks left out) * |v_j|
        weighting "none": without |v_j|
    """

    name = "expectedattention"
    title = "Expected Attention: what the next queries should want"
    paper = "arXiv 2510.00636"
    evidence = Evidence.QUERY_MOMENTS

    class Args(PolicyArgs):
        recent: int = Field(32, ge=0, le=4096, description="Last tokens of the prompt that always stay.")
        future: int = Field(512, ge=1, le=65536, description="Positions after the prompt whose rotation is averaged.")
        epsilon: float = Field(1e-4, ge=0, le=1, description="Added to expected attention before it is weighted.")
        weighting: Literal["values", "none"] = Field(
            "values", description="Whether expected attention is weighted by the length (L2) of the token's value."
        )

    args: Args

    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        mean, covariance = future_queries(evidence, self.args.future)
        num_kv_heads, n, _ = evidence.shape
        group, sinks = len(mean) // num_kv_heads, min(self.args.sinks, n - 1)
        scores = torch.empty(num_kv_heads, n - sinks, device=evidence.device)
        for head, row in enumerate(scores):
            own = slice(head * group, (head + 1) * group)
            parts = evidence.keys[head, sinks:].split(max(1, _MAX_ELEMENTS // mean[own].numel()))
            logits = [expected_logits(part.float(), mean[own], covariance[own], evidence.scale) for part in parts]
            row.copy_(torch.cat(logits, 1).softmax(-1).mean(0))
        scores += self.args.epsilon
        if self.args.weighting == "values":
            scores *= torch.linalg.vector_norm(evidence.values[:, sinks:], dim=-1, dtype=torch.float32)
        return F.pad(scores, (sinks, 0), value=float("inf"))


def future_queries(evidence: LayerEvidence, future: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [num_heads, head_dim] and covariance [num_heads, head_dim, head_dim] of the queries to come: float32.

    Raises:
        ValueError: the evidence has no moments, or no rotation.
    """
    moments, rotary = evidence.observed.get(QueryMoments.name), evidence.model.rotary
    if moments is None or rotary is None:
        raise ValueError("the moments of the prompt's queries are needed and were not gathered")
    first, last = evidence.shape[1], evidence.shape[1] + future
    # R S R^T: rows are rotated, then columns.
    half = rotary.rotate_on_average(moments[:, 1:], first, last)
    covariance = rotary.rotate_on_average(half.transpose(1, 2), first, last)
    return rotary.rotate_on_average(moments[:, 0], first, last), covariance


def expected_logits(keys: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor, scale: float) -> torch.Tensor:
    """The logarithm of the expected `exp(scale * q . k)` of Gaussian queries q: float32 [heads, n].

    Args:
        keys: float32 [n, head_dim].
        mean, covariance: of the queries of some heads, [heads, head_dim] and [heads, head_dim, head_dim].
    """
    # scale * m . k + scale^2 / 2 * k . S k, as one product with k.
    expanded = keys.expand(len(mean), -1, -1)
    forms = torch.baddbmm(scale * mean[:, None], expanded, covariance, alpha=scale**2 / 2)
    return forms.mul_(keys).sum(-1)
