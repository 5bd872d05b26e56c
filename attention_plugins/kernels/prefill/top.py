"""`attention_plugins.prefill.choose.top` without sorting: the k-th highest number is found a digit of 8 bits at a time.

A program holds a short row. Long ones are shared among programs: four launches find the number, one writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention_plugins.kernels.prefill.choose import block
from attention_plugins.kernels.radix import count_digits, narrow

_CHUNK = 8192
_VARYING = ["stride", "count_stride", "given", "n"]


@triton.jit
def _ordered(scores):
    """float32 -> uint32 of the same order; zeros are one number, NaN is the largest."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, ~bits, bits | -2147483648)
    return tl.where(scores != scores, -1, bits).to(tl.uint32, bitcast=True)


@triton.jit
def _wanted(counts, count_stride, given, row, n):
    """How many are to be chosen."""
    asked = tl.full([], 0, tl.int64) + given
    if counts is not None:
        asked = tl.load(counts + row * count_stride)
    return tl.minimum(tl.maximum(asked, 0), n).to(tl.int32)


@triton.jit
def _flags(value, keys, there, threshold, left, k):
    """Which are chosen, if the first `left` of those that equal the threshold are."""
    equal = (there & (keys == threshold)).to(tl.int32)
    chosen = ((keys > threshold) & (k > 0)) | ((equal != 0) & (tl.cumsum(equal, 0) <= left) & (k > 0))
    return (chosen | (value != value)).to(tl.uint8)


@triton.jit(do_not_specialize=_VARYING)
def _top_short(scores, stride, counts, count_stride, given, chosen, n, N: tl.constexpr):
    row, place = tl.program_id(0), tl.arange(0, N)
    there = place < n
    value = tl.load(scores + row.to(tl.int64) * stride + place, mask=there, other=0.0)
    keys, digit = _ordered(value), tl.arange(0, 256)
    k = _wanted(counts, count_stride, given, row, n)
    left, prefix = tl.maximum(k, 1), tl.full([], 0, tl.uint32)
    for number in tl.static_range(4):
        its = there
        if number > 0:
            its = there & ((keys >> (32 - 8 * number)) == prefix)
        histogram = count_digits(((keys >> (24 - 8 * number)) & 255).to(tl.int32), its)
        higher = tl.sum(histogram, 0) - tl.cumsum(histogram, 0)
        at = (higher < left) & (higher + histogram >= left)
        left -= tl.sum(tl.where(at, higher, 0), 0)
        prefix = (prefix << 8) | tl.sum(tl.where(at, digit, 0), 0).to(tl.uint32)
    out = chosen + row.to(tl.int64) * n + place
    tl.store(out, _flags(value, keys, there, prefix, left, k), mask=there)


@triton.jit(do_not_specialize=_VARYING)
def _count_digit(
    scores, stride, counts, count_stride, given, histograms, states, equals, n, PASS: tl.constexpr, N: tl.constexpr
):
    """Add a chunk's counts of this pass's digit; of the last one, keep them apart, too."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(2)
    place, digit = chunk * N + tl.arange(0, N), tl.arange(0, 256)
    there = place < n
    keys = _ordered(tl.load(scores + row * stride + place, mask=there, other=0.0))
    k = tl.maximum(_wanted(counts, count_stride, given, row, n), 1)
    prefix, _ = narrow(histograms, states, row, k, PASS)
    if PASS > 0:
        there = there & ((keys >> (32 - 8 * PASS)).to(tl.int32) == prefix)
    found = count_digits(((keys >> (24 - 8 * PASS)) & 255).to(tl.int32), there)
    tl.atomic_add(histograms + row * 1024 + PASS * 256 + digit, found, mask=found > 0, sem="relaxed")
    if PASS == 3:
        tl.store(equals + (row * tl.num_programs(2) + chunk) * 256 + digit, found)


@triton.jit(do_not_specialize=_VARYING)
def _write(
    scores, stride, counts, count_stride, given, histograms, states, equals, chosen, n, N: tl.constexpr
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(2)
    place, other = chunk * N + tl.arange(0, N), tl.arange(0, 128)
    there = place < n
    value = tl.load(scores + row * stride + place, mask=there, other=0.0)
    k = _wanted(counts, count_stride, given, row, n)
    prefix, left = narrow(histograms, states, row, tl.maximum(k, 1), 4)
    before = equals + row * tl.num_programs(2) * 256 + (prefix & 255)
    earlier = tl.zeros([128], tl.int32)
    for first in range(0, chunk, 128):
        earlier += tl.load(before + (first + other) * 256, mask=first + other < chunk, other=0)
    threshold = prefix.to(tl.uint32, bitcast=True)
    found = _flags(value, _ordered(value), there, threshold, left - tl.sum(earlier, 0), k)
    tl.store(chosen + row * n + place, found, mask=there)


def top(scores: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """See `attention_plugins.prefill.choose.top`."""
    n = scores.shape[-1]
    rows = scores.float().flatten(0, -2)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    counts, count_stride, given = None, 0, 0
    if isinstance(count, torch.Tensor):
        counts, count_stride = count.expand(*scores.shape[:-1], 1).contiguous(), 1
    else:
        given = count
    chosen = torch.empty(scores.shape, dtype=torch.uint8, device=scores.device)
    what = rows, rows.stride(0), counts, count_stride, given
    if n <= _CHUNK:
        _top_short[(len(rows),)](*what, chosen, n, **block(n, _CHUNK))
        return chosen.view(torch.bool)
    chunks = triton.cdiv(n, _CHUNK)
    grid, size = (len(rows), 1, chunks), {"N": _CHUNK, "num_warps": 8}
    histograms = torch.zeros(len(rows), 4, 256, dtype=torch.int32, device=rows.device)
    states = torch.empty(len(rows), 5, 2, dtype=torch.int32, device=rows.device)
    equals = torch.empty(len(rows), chunks, 256, dtype=torch.int32, device=rows.device)
    for digit in range(4):
        _count_digit[grid](*what, histograms, states, equals, n, PASS=digit, **size)
    _write[grid](*what, histograms, states, equals, chosen, n, **size)
    return chosen.view(torch.bool)
