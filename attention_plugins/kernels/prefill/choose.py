"""`attention_plugins.prefill.choose` without sorting: thresholds are searched for, a few bits at a time.

Scores become integers of the same order. What a sort would add up one by one is added up all at once here, so sums
differ by rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention_plugins.prefill.choose import ROUNDING

_LONG, _CHUNK = 8192, 4096
_VARYING = ["n", "stride", "forced_row", "rows", "chunks", "number"]


@triton.jit
def _bits(mass):
    """float32 >= 0 -> int32 of the same order. NaN is none of them."""
    return tl.where(mass > 0.0, mass, 0.0).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=_VARYING)
def _cover(mass, stride, forced, forced_row, rows, share, chosen, n, N: tl.constexpr):
    """A row in registers. The threshold is the largest number such that what isn't below reaches the share."""
    row, place = tl.program_id(0), tl.arange(0, N)
    there = place < n
    value = tl.load(mass + row.to(tl.int64) * stride + place, mask=there, other=0.0)
    first = there & (place < 0)
    if forced is not None:
        first = tl.load(forced + (row % rows) * forced_row + place, mask=there, other=0) != 0
    base = tl.sum(tl.where(first, value, 0.0), 0)
    target = share * tl.sum(value, 0)
    free = there & (first == 0)
    bits = tl.where(free, _bits(value), -1)
    value = tl.where(free, value, 0.0)
    threshold = tl.full([], 0, tl.int32)
    for step in range(31):
        one = threshold | (tl.full([], 1, tl.int32) << (30 - step))
        threshold = tl.where(base + tl.sum(tl.where(bits >= one, value, 0.0), 0) >= target, one, threshold)
    before = base + tl.sum(tl.where(bits > threshold, value, 0.0), 0)
    equal = (bits == threshold).to(tl.int32)
    earlier = tl.cumsum(equal, 0) - equal
    enough = before + earlier.to(tl.float32) * value >= target
    wanted = first | (bits > threshold) | ((equal != 0) & (enough == 0))
    spoilt = tl.zeros([N], tl.float32) + target
    wanted = wanted | (spoilt != spoilt)
    tl.store(chosen + row.to(tl.int64) * n + place, wanted.to(tl.uint8), mask=there)


@triton.jit
def _count(line, n, threshold, limit, N: tl.constexpr):
    """How many numbers it takes, if the last ones have the threshold's first 24 bits: these count as equal, their mean
    stands for each."""
    most = threshold + (1 << 7)
    sums, above, within = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    more, equal = tl.zeros([N], tl.int32), tl.zeros([N], tl.int32)
    for start in range(0, n, N):
        place = start + tl.arange(0, N)
        value = tl.load(line + place, mask=place < n, other=0.0)
        bits = tl.where(place < n, _bits(value), -1)
        sums += value
        above += tl.where(bits >= most, value, 0.0)
        more += (bits >= most).to(tl.int32)
        its = (bits >= threshold) & (bits < most)
        within += tl.where(its, value, 0.0)
        equal += its.to(tl.int32)
    total, counted, members = tl.sum(sums, 0), tl.sum(more, 0), tl.sum(equal, 0)
    mean = tl.sum(within, 0) / tl.maximum(members, 1)
    room = tl.maximum(limit - tl.sum(above, 0), 0.0)
    further = tl.where(mean > 0.0, tl.minimum(room / mean, members.to(tl.float32)), 0.0).to(tl.int32)
    found = tl.where(total <= limit, n, counted + further + 1)
    return tl.where(total == total, tl.minimum(found, n), 1).to(tl.int64)


@triton.jit(do_not_specialize=_VARYING)
def _count_to_reach(mass, counts, n, limit, N: tl.constexpr):
    """A row in registers."""
    row, place = tl.program_id(0), tl.arange(0, N)
    line = mass + row.to(tl.int64) * n
    value = tl.load(line + place, mask=place < n, other=0.0)
    bits = _bits(value)
    threshold = tl.full([], 0, tl.int32)
    for step in range(24):
        one = threshold | (tl.full([], 1, tl.int32) << (30 - step))
        threshold = tl.where(tl.sum(tl.where(bits >= one, value, 0.0), 0) > limit, one, threshold)
    tl.store(counts + row, _count(line, n, threshold, limit, N))


@triton.jit
def _narrower(sums, states, row, chunks, limit, number):
    """The threshold's first bits, after so many passes of 4 bits each."""
    threshold = tl.full([], 0, tl.int32)
    if number > 0:
        part, digit = tl.arange(0, 64), tl.arange(0, 16)
        total = tl.zeros([64, 16], tl.float32)
        for first in range(0, chunks, 64):
            at = ((row * 6 + number - 1) * chunks + first + part) * 16
            total += tl.load(sums + at[:, None] + digit, mask=(first + part < chunks)[:, None], other=0.0)
        over = (tl.sum(total, 0) > limit) & (digit > 0)
        threshold = tl.load(states + row * 8 + number - 1) + (tl.sum(over.to(tl.int32), 0) << (31 - 4 * number))
    return threshold


@triton.jit(do_not_specialize=_VARYING)
def _sum_above(mass, sums, states, n, chunks, limit, number, N: tl.constexpr):
    """Sums of a chunk's numbers that reach the threshold with one of 15 digits behind it."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = chunk * N + tl.arange(0, N)
    value = tl.load(mass + row * n + place, mask=place < n, other=0.0)
    bits = _bits(value)
    threshold = _narrower(sums, states, row, chunks, limit, number)
    if chunk == 0:
        tl.store(states + row * 8 + number, threshold)
    out = sums + ((row * 6 + number) * chunks + chunk) * 16
    for digit in tl.static_range(1, 16):
        least = threshold + (tl.full([], digit, tl.int32) << (27 - 4 * number))
        tl.store(out + digit, tl.sum(tl.where(bits >= least, value, 0.0), 0))


@triton.jit(do_not_specialize=_VARYING)
def _count_long(mass, sums, states, counts, n, chunks, limit, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    threshold = _narrower(sums, states, row, chunks, limit, 6)
    tl.store(counts + row, _count(mass + row * n, n, threshold, limit, N))


def block(n: int, most: int) -> dict[str, int]:
    size = max(128, min(most, triton.next_power_of_2(n)))
    return {"N": size, "num_warps": max(1, min(32, size // 256))}


def cover(mass: torch.Tensor, share: float, first: torch.Tensor | None = None) -> torch.Tensor:
    """See `attention_plugins.prefill.choose.cover`; `first` is [n], or [rows, n] of the last dimension but one.

    Raises:
        ValueError: `first` has other shapes.
    """
    if share >= 1:
        return torch.ones_like(mass, dtype=torch.bool)
    n, mass = mass.shape[-1], mass.contiguous()
    forced, rows = None, 1
    if first is not None:
        if first.shape not in (mass.shape[-1:], mass.shape[-2:]):
            raise ValueError(f"what is chosen first must be alike for all heads; got {tuple(first.shape)}")
        forced, rows = first.contiguous().view(torch.uint8), first.shape[0] if first.dim() > 1 else 1
    chosen = torch.empty(mass.shape, dtype=torch.uint8, device=mass.device)
    _cover[(mass.numel() // n,)](
        mass, n, forced, n, rows, share - ROUNDING, chosen, n, **block(n, triton.next_power_of_2(n))
    )
    return chosen.view(torch.bool)


def count_to_reach(mass: torch.Tensor, share: float) -> torch.Tensor:
    """See `attention_plugins.prefill.choose.count_to_reach`."""
    n, mass = mass.shape[-1], mass.contiguous()
    counts = torch.empty(*mass.shape[:-1], 1, dtype=torch.int64, device=mass.device)
    if share >= 1:
        return counts.fill_(n)
    limit = share + ROUNDING
    if n <= _LONG:
        _count_to_reach[(counts.numel(),)](mass, counts, n, limit, **block(n, _LONG))
        return counts
    chunks = triton.cdiv(n, _CHUNK)
    sums = torch.zeros(counts.numel(), 6, chunks, 16, device=mass.device)
    states = torch.empty(counts.numel(), 8, dtype=torch.int32, device=mass.device)
    for number in range(6):
        _sum_above[(counts.numel(), chunks)](mass, sums, states, n, chunks, limit, number, N=_CHUNK, num_warps=4)
    _count_long[(counts.numel(),)](mass, sums, states, counts, n, chunks, limit, **block(n, _LONG))
    return counts
