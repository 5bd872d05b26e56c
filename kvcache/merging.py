"""Merging: what dropped tokens leave behind in kept ones (D2O, arXiv 2406.13035). Plain torch, a layer at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import normalize

# Bounds the memory of `Merger.merge`: numbers held at once, 4 bytes each, unless one dropped token has more.
_MAX_SIMILARITIES = 1 << 24

MergeRule = Literal["paper", "scatter"]


@dataclass(frozen=True)
class Merger:
    """Folds each dropped token into the kept token of its KV head whose key is most similar, if it is similar enough.

    Attributes:
        rule: `paper` is a convex combination: with similarities u, the kept token weighs e / (e + Σ exp u) and each
            merged one exp u / (e + Σ exp u). `scatter` is the published code's: the mean of the kept token and of the
            merged ones times their similarities.
        threshold: added to the layer's mean similarity: what is at least so similar is merged.
    """

    rule: MergeRule
    threshold: float = 0.0

    def merge(
        self, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor, dropped: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept keys and values with the dropped ones merged in; nothing waits for the device.

        Tokens with a NaN or an infinity are not merged. Sums are float32, in the same order every time.

        Args:
            keys, values: [num_kv_heads, n, head_dim] of one layer, real numbers; only read.
            kept, dropped: int64 [num_kv_heads, any], positions; n fills rows up.

        Returns:
            Keys and values of `kept`, [num_kv_heads, kept, head_dim] in the dtype of `keys`. What nothing was merged
            into keeps its bits; rows are arbitrary where `kept` is n.
        """
        own_keys, own_values = _take(keys, kept), _take(values, kept)
        if not dropped.shape[1]:
            return own_keys, own_values
        similarity, slot = nearest(keys, values, kept, dropped)
        known = similarity > -math.inf
        mean = similarity.masked_fill(~known, 0).sum() / known.sum().clamp(min=1)
        merged = known & (similarity >= mean + self.threshold)
        own, weight = (math.e, similarity.exp()) if self.rule == "paper" else (1.0, similarity)
        share = weight if self.rule == "paper" else torch.ones_like(weight)
        received = _sums(share.masked_fill(~merged, 0)[..., None], slot, kept.shape[1])
        piece = max(1, _MAX_SIMILARITIES // (len(keys) * 2 * keys.shape[-1]))
        sums = own * torch.cat([own_keys, own_values], -1).float()
        for part in torch.arange(dropped.shape[1], device=keys.device).split(piece):
            content = torch.cat([_take(keys, dropped[:, part]), _take(values, dropped[:, part])], -1).float()
            content = content * weight[:, part, None]
            sums += _sums(content.masked_fill_(~merged[:, part, None], 0), slot[:, part], kept.shape[1])
        new_keys, new_values = (sums / (own + received)).to(keys.dtype).chunk(2, -1)
        changed = received > 0
        return torch.where(changed, new_keys, own_keys), torch.where(changed, new_values, own_values)


def nearest(
    keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor, dropped: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The most similar kept key of each dropped one, by cosine, on a GPU by a kernel; arguments as in `Merger.merge`.

    Returns:
        float32 [num_kv_heads, dropped], -inf for what can't be merged or is no token; and int64, its place in `kept`.
    """
    heads, n, _ = keys.shape
    # Infinite or NaN where one of a value's numbers is.
    finite = torch.linalg.vector_norm(values, math.inf, dim=-1).isfinite()
    usable = finite.gather(1, dropped.clamp(max=n - 1)) & (dropped < n)
    if keys.is_cuda:
        from kvcache.kernels.nearest_keys import nearest_fused

        similarity, slot = nearest_fused(keys, kept, dropped)
        return similarity.masked_fill_(~usable, -math.inf), slot
    unit = normalize(_take(keys, kept).float(), dim=-1).transpose(1, 2)
    similarities, slots = [], []
    piece = max(1, _MAX_SIMILARITIES // (heads * kept.shape[1]))
    for part in dropped.split(piece, 1):
        cosines = normalize(_take(keys, part).float(), dim=-1) @ unit
        cosines.masked_fill_(cosines.isnan() | (kept == n)[:, None], -math.inf)
        best = cosines.max(-1)
        similarities.append(best.values)
        slots.append(best.indices)
    return torch.cat(similarities, 1).masked_fill_(~usable, -math.inf), torch.cat(slots, 1)


def _take(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[heads, n, d] at int64 [heads, any]; where that is n, any token."""
    heads = torch.arange(len(tokens), device=tokens.device)[:, None]
    return tokens[heads, positions.clamp(max=tokens.shape[1] - 1)]


def _sums(content: torch.Tensor, slot: torch.Tensor, size: int) -> torch.Tensor:
    """Sums of the rows with the same slot: [heads, m, d] and int64 [heads, m] -> [heads, size, d].

    By sorting: adding where they belong (`scatter_add_`) has an order of its own on a GPU every time.
    """
    heads = len(slot)
    flat = (slot + torch.arange(heads, device=slot.device)[:, None] * size).flatten()
    order = flat.sort(stable=True).indices
    lengths = torch.zeros(heads * size, dtype=torch.int64, device=slot.device)
    lengths.scatter_add_(0, flat, torch.ones_like(flat))
    rows = content.flatten(0, 1)[order]
    return torch.segment_reduce(rows, "sum", lengths=lengths, axis=0, unsafe=True).view(heads, size, -1)
