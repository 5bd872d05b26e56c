"""`kvcache.merging.nearest` in one pass over dropped and kept keys: no cosine is ever written to memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcache.evidence import PagedEvidence
from kvcache.kernels.similar_keys import key_shape


# Numbers that differ from request to request are no compile-time constants: a new one must not wait for a compiler.
@triton.jit(do_not_specialize=["n", "num_kept", "num_dropped"])
def _nearest(
    keys, norms, kept, dropped, similarities, slots, n, num_kept, num_dropped, by_head, by_token,
    DIM: tl.constexpr, DIM_2: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Of each dropped key the largest cosine with a kept one, and which; -inf where there is none that is a number."""
    head = tl.program_id(1).to(tl.int64)
    keys, norms = keys + head * by_head, norms + head * n
    kept, dropped = kept + head * num_kept, dropped + head * num_dropped
    row, dim = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM_2)
    real, within = row < num_dropped, dim < DIM
    token = tl.load(dropped + row, mask=real, other=n)
    q = tl.load(keys + token[:, None] * by_token + dim, mask=(token < n)[:, None] & within, other=0.0)
    length = tl.load(norms + token, mask=token < n, other=1.0)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    slot = tl.zeros([ROWS], tl.int32)
    for start in range(0, num_kept, KEYS):
        place = start + tl.arange(0, KEYS)
        to = tl.load(kept + place, mask=place < num_kept, other=n)
        k = tl.load(keys + to[:, None] * by_token + dim, mask=(to < n)[:, None] & within, other=0.0)
        inverse = 1 / tl.load(norms + to, mask=to < n, other=float("nan"))
        cosines = tl.dot(q, tl.trans(k), input_precision="tf32x3") * inverse[None, :]
        cosines = tl.where(cosines == cosines, cosines, float("-inf"))
        most, where = tl.max(cosines, 1, return_indices=True)
        slot = tl.where(most > best, start + where, slot)
        best = tl.maximum(best, most)
    best = best / length
    best = tl.where(best == best, best, float("-inf"))
    out = head * num_dropped + row
    tl.store(similarities + out, best, mask=real)
    tl.store(slots + out, slot, mask=real)


def nearest_fused(keys: torch.Tensor, kept: torch.Tensor, dropped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each dropped key the largest cosine with a kept one: `kvcache.merging.nearest`, whatever the values are.

    Numbers are multiplied as in `kvcache.kernels.similar_keys`, and the same keys are taken.

    Args:
        keys: [num_kv_heads, n, head_dim].
        kept, dropped: int64 [num_kv_heads, any], positions; n fills rows up.

    Returns:
        float32 [num_kv_heads, dropped], -inf where a cosine is no number; and int64, the place in `kept`.
    """
    heads, n, dim = keys.shape
    norms, shape = key_shape(keys)
    similarities = torch.empty(dropped.shape, device=keys.device)
    slots = torch.empty(dropped.shape, dtype=torch.int32, device=keys.device)
    _nearest[(triton.cdiv(dropped.shape[1], shape["ROWS"]), heads)](
        keys, norms, kept.contiguous(), dropped.contiguous(), similarities, slots,
        n, kept.shape[1], dropped.shape[1], keys.stride(0), keys.stride(1),
        DIM=dim, **shape,
    )  # fmt: skip
    return similarities, slots.long()


def warm_up(evidence: PagedEvidence) -> None:
    """Compile the kernel for keys of the running cache; any of its evidence will do."""
    tokens = torch.arange(evidence.shape[1], device=evidence.device).expand(evidence.shape[0], -1)
    nearest_fused(evidence.keys, tokens, tokens)
