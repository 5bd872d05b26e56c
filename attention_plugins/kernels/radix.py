"""The k highest of many scores, exactly: what the kernels of `attention_plugins.kernels.top` share.

Scores become unsigned integers of the same order. Above a threshold everything is chosen, and of what equals it the
first few.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered(scores):
    """float32 -> uint32 of the same order; zeros are one number, and NaN is infinity."""
    scores = tl.where(scores == 0.0, 0.0, scores)
    bits = tl.where(scores != scores, float("inf"), scores).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, ~bits, bits | -2147483648)
    return bits.to(tl.uint32, bitcast=True)


@triton.jit
def threshold_in_registers(keys, k):
    """The k-th highest key, bit by bit, and how many of the keys that equal it are among the k highest.

    uint32 [n], 0 where there is no score (no real score's key is); k >= 1.
    """
    threshold, bit = tl.zeros([1], tl.uint32), tl.full([1], 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = threshold | bit
        enough = tl.sum((keys >= candidate).to(tl.int32), 0) >= k
        threshold = tl.where(enough, candidate, threshold)
        bit = bit >> 1
    return threshold, k - tl.sum((keys > threshold).to(tl.int32), 0)


@triton.jit
def next_digit(histogram, k):
    """The digit of the k-th highest key, and which of the keys with this digit it is, from 256 counts in memory."""
    digit = tl.arange(0, 256)
    count = tl.load(histogram + digit)
    higher = tl.sum(count, 0) - tl.cumsum(count, 0)
    its = (higher < k) & (higher + count >= k)
    return tl.sum(tl.where(its, digit, 0), 0), k - tl.sum(tl.where(its, higher, 0), 0)


@triton.jit
def count_digits(keys, there):
    """How many keys have each digit: [n] with digits 0 ... 255, n a power of two -> int32 [256]."""
    counts = tl.histogram(tl.where(there, keys, 0), 256)
    elsewhere = tl.sum((there == 0).to(tl.int32), 0)
    return counts - tl.where(tl.arange(0, 256) == 0, elsewhere, 0)


@triton.jit
def ranks(above, equal, need, BITS: tl.constexpr):
    """Which are chosen, and as which of them, given flags of what is above the threshold and what equals it, and how
    many of the equal ones are needed: bool and int32 [n], n < 2**BITS and BITS < 16."""
    counts = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << BITS), 0)
    equals = counts >> BITS
    return above | (equal & (equals <= need)), (counts & ((1 << BITS) - 1)) + tl.minimum(equals, need) - 1
