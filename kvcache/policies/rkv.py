"""R-KV."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch.nn.functional import normalize

from kvcache.evidence import Evidence, LayerEvidence
from kvcache.method import Odd
from kvcache.policies.base import AnswerArgs, Policy
from kvcache.scorers import pool

# Bounds the memory of `newest_similar` on a CPU: cosines held at once, about 12 bytes each.
_MAX_COSINES = 1 << 23
_ONE = 1 << 30
"""A cosine of 1 in whole numbers: no sum of cosines overflows, and float32 is coarser."""


class RKV(Policy):
    """Keep what the last queries attend to and what no other kept key says again.

    Importance is the attention of the last `window` queries to the tokens before them (of a KV head's query heads the
    largest logit counts), pooled; redundancy grows with a key's cosine to all others, but of the keys similar to one
    the newest is spared. The score is `mix * importance - (1 - mix) * redundancy`. Each key looks for
    its newest similar one: where keys have none, time grows with the square of the prompt's length (memory does not).
    Written for long answers, which it compacts every `interval` tokens; a long prompt likewise. `mix` is the paper's
    0.1, the published code has 0.07; that code also spares the first token once for every key that is like no other,
    which this doesn't. The paper forces no sinks (`sinks: 0`).

    Formula:
        I_j = max pooling over `kernel` of the mean over the last `window` queries q of
              softmax_j(max over query heads of q . k_j), j before the window
        C_ij = cos(k_i, k_j); 0 for i = j, and in each row i for the newest j with C_ij > threshold
        R_j = softmax_j(mean over i of C_ij)
        score_j = mix * I_j - (1 - mix) * R_j
    """

    name = "rkv"
    title = "R-KV: important and not redundant"
    paper = "arXiv 2505.24133"
    heads_alone = True
    evidence = Evidence.WINDOW_QUERIES
    query_aware = True

    class Args(AnswerArgs):
        window: int = Field(8, ge=1, le=1024, description="Last queries that vote; these tokens always stay.")
        kernel: Odd = Field(7, ge=1, le=127, description="Width of the max pooling of importance; odd.")
        mix: float = Field(0.1, ge=0, le=1, description="Weight of importance; that of redundancy is the rest.")
        threshold: float = Field(0.5, ge=-1, le=1, description="Cosine from which on two keys are similar.")

    args: Args

    @property
    def recent(self) -> int:
        return self.args.window

    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        if evidence.window_queries is None:
            raise ValueError("the prompt's last queries are needed and were not kept")
        num_kv_heads, n, _ = evidence.shape
        queries = evidence.window_queries.float().unflatten(1, (num_kv_heads, -1))
        older = n - len(queries)
        votes = pool(importance(queries, evidence.keys[:, :older].float(), evidence.scale), "max", self.args.kernel)
        repeated = redundancy(evidence.keys, self.args.threshold)[:, :older]
        scores = self.args.mix * votes - (1 - self.args.mix) * repeated
        return F.pad(scores, (0, len(queries)), value=float("inf"))


def importance(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """What queries give to keys that are all older: the largest logit of the group, softmax, mean over queries.

    Args:
        queries: float32 [w, num_kv_heads, group, head_dim], post-RoPE.
        keys: float32 [num_kv_heads, n, head_dim], post-RoPE.

    Returns:
        float32 [num_kv_heads, n].
    """
    logits = torch.einsum("whgd,hnd->hwgn", queries, keys) * scale
    return logits.amax(2).softmax(-1).mean(1)


def redundancy(keys: torch.Tensor, threshold: float) -> torch.Tensor:
    """How much the others repeat each key: float32 [num_kv_heads, n], rows of sum 1.

    Of each row of the matrix of cosines (without its diagonal) the newest key above the threshold is set to zero,
    nothing where there is none; the softmax of the columns' means is the redundancy.

    The columns' sums are each key's product with the sum of all, which takes no matrix. Only what is spared needs one,
    and of that only where it is and how much.

    Args:
        keys: [num_kv_heads, n, head_dim].
    """
    unit = normalize(keys.float(), dim=-1)
    total = (unit @ unit.sum(1)[..., None]).squeeze(-1) - unit.square().sum(-1)
    place, cosine = newest_similar(keys, threshold)
    # Whole numbers: their sums don't depend on the order, which on a GPU is another one every time.
    whole = (cosine * _ONE).round().long()
    spared = torch.zeros_like(whole).scatter_add_(1, place.clamp(min=0), whole)
    return ((total - spared.float() / _ONE) / keys.shape[1]).softmax(-1)


def newest_similar(keys: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each key the newest other one whose cosine with it is above the threshold; on a GPU by a kernel.

    Args:
        keys: [num_kv_heads, n, head_dim].

    Returns:
        int64 [num_kv_heads, n], its place, and float32, its cosine; -1 and 0 where there is none.
    """
    if keys.is_cuda:
        from kvcache.kernels.similar_keys import newest_similar_fused

        return newest_similar_fused(keys, threshold)
    heads, n, _ = keys.shape
    unit, places = normalize(keys.float(), dim=-1), torch.arange(n, device=keys.device, dtype=torch.int32)
    newest, cosine = [], []
    for rows in places.split(max(1, _MAX_COSINES // (heads * n))):
        cosines = unit[:, rows] @ unit.transpose(1, 2)
        similar = (cosines > threshold) & (places != rows[:, None])
        place = torch.where(similar, places, -1).amax(-1, keepdim=True).long()
        newest.append(place)
        cosine.append(cosines.gather(2, place.clamp(min=0)).masked_fill_(place < 0, 0))
    return torch.cat(newest, 1).squeeze(-1), torch.cat(cosine, 1).squeeze(-1)
