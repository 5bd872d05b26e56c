"""`kvcache.policies.rkv.newest_similar` in one pass over pairs of keys: no cosine is ever written to memory.

Keys are looked at from the newest to the oldest, and a block of rows is done as soon as each of its rows has found one:
time grows with the square of the number of keys only where rows have no similar key.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcache.evidence import PagedEvidence

_STEPS = 16
"""Blocks of keys between two looks at whether a row is still searching; a loop of fixed length is pipelined."""


# Numbers that differ from request to request are no compile-time constants: a new one must not wait for a compiler.
@triton.jit(do_not_specialize=["n"])
def _newest(
    keys, norms, places, cosines, n, by_head, by_token, threshold,
    DIM: tl.constexpr, DIM_2: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Of each row the newest other key with a cosine above the threshold, and that cosine; -1 and 0 for none."""
    head = tl.program_id(1).to(tl.int64)
    keys, norms = keys + head * by_head, norms + head * n
    row, dim = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM_2)
    real, within = row < n, dim < DIM
    q = tl.load(keys + row[:, None].to(tl.int64) * by_token + dim, mask=real[:, None] & within, other=0.0)
    length = tl.load(norms + row, mask=real, other=1.0)
    least = threshold * length
    place = tl.full([ROWS], -1, tl.int32)
    end = tl.cdiv(n, KEYS) * KEYS
    searching = 1
    while (end > 0) & (searching > 0):
        for step in range(STEPS):
            key = end - (step + 1) * KEYS + tl.arange(0, KEYS)
            there = (key >= 0) & (key < n)
            k = tl.load(keys + key[:, None].to(tl.int64) * by_token + dim, mask=there[:, None] & within, other=0.0)
            # NaN where there is no key: not above any threshold.
            inverse = 1 / tl.load(norms + key, mask=there, other=float("nan"))
            products = tl.dot(q, tl.trans(k), input_precision="tf32x3") * inverse[None, :]
            similar = (products > least[:, None]) & (key[None, :] != row[:, None])
            place = tl.maximum(place, tl.max(tl.where(similar, key[None, :], -1), 1))
        end -= STEPS * KEYS
        searching = tl.max((real & (place < 0)).to(tl.int32), 0)
    found = real & (place >= 0)
    product = tl.zeros([ROWS], tl.float32)
    for start in range(0, DIM_2, 16):  # a few numbers at a time: whole rows would take too many registers
        part = start + tl.arange(0, 16)
        inside = found[:, None] & (part < DIM)
        one = tl.load(keys + row[:, None].to(tl.int64) * by_token + part, mask=inside, other=0.0)
        other = tl.load(keys + place[:, None].to(tl.int64) * by_token + part, mask=inside, other=0.0)
        product += tl.sum(one.to(tl.float32) * other.to(tl.float32), 1)
    cosine = product / (length * tl.load(norms + place, mask=found, other=1.0))
    tl.store(places + head * n + row, place, mask=real)
    tl.store(cosines + head * n + row, tl.where(found, cosine, 0.0), mask=real)


def key_shape(keys: torch.Tensor) -> tuple[torch.Tensor, dict[str, int]]:
    """Lengths of keys, float32 [num_kv_heads, n], and the sizes of a kernel that multiplies blocks of them.

    Any head size up to 256: it is filled up with zeros to a power of two, at least 16.

    Raises:
        ValueError: keys whose numbers don't follow each other, or of more than 256.
    """
    dim = keys.shape[2]
    if keys.stride(2) != 1 or dim > 256:
        raise ValueError(f"the kernels read keys of up to 256 adjacent numbers, not {dim} at stride {keys.stride(2)}")
    # As torch.nn.functional.normalize: a key of zeros is like no other.
    norms = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32).clamp(min=1e-12).contiguous()
    dim_2 = max(16, triton.next_power_of_2(dim))
    # Of these, two programs fit on an H100's multiprocessor (122 registers a thread, 64 KiB at 128 bf16 numbers): one
    # multiplies while the other looks for its maxima.
    rows, warps = (128, 8) if dim_2 * keys.element_size() <= 256 else (64, 4)
    return norms, {"DIM_2": dim_2, "ROWS": rows, "KEYS": 64, "num_warps": warps, "num_stages": 2}


def newest_similar_fused(keys: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kvcache.policies.rkv.newest_similar`.

    bf16 and fp16 keys are multiplied as they are, float32 ones as three TF32 products (float32 but for the last bits);
    sums are float32.

    Raises:
        ValueError: see `key_shape`.
    """
    heads, n, dim = keys.shape
    norms, shape = key_shape(keys)
    places = torch.empty(heads, n, dtype=torch.int32, device=keys.device)
    cosines = torch.empty(heads, n, device=keys.device)
    _newest[(triton.cdiv(n, shape["ROWS"]), heads)](
        keys, norms, places, cosines, n, keys.stride(0), keys.stride(1), threshold,
        DIM=dim, STEPS=_STEPS, **shape,
    )  # fmt: skip
    return places.long(), cosines


def warm_up(evidence: PagedEvidence) -> None:
    """Compile the kernel for keys of the running cache; any of its evidence will do."""
    newest_similar_fused(evidence.keys, 0.5)
