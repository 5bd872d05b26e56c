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
    """A number that k keys reach or, where keys are equal, as few more as can be; and how many of the keys that equal
    it are among the k highest.

    uint32 [n], 0 where there is no score (no real score's key is); n < 2**20, k >= 1. Two bits at a time, until exactly
    k keys are left: their own last bits don't matter.
    """
    threshold, shift, reached = tl.full([], 0, tl.uint32), 30, -1
    while (shift >= 0) & (reached != k):
        one = tl.full([], 1, tl.uint32) << shift
        low, middle, high = threshold + one, threshold + 2 * one, threshold + 3 * one
        counts = (
            (keys >= low).to(tl.int64) + ((keys >= middle).to(tl.int64) << 20) + ((keys >= high).to(tl.int64) << 40)
        )
        counts = tl.sum(counts, 0)
        lows, middles, highs = counts & 0xFFFFF, (counts >> 20) & 0xFFFFF, counts >> 40
        step = tl.where(highs >= k, 3, tl.where(middles >= k, 2, tl.where(lows >= k, 1, 0)))
        found = tl.where(highs >= k, highs, tl.where(middles >= k, middles, lows)).to(tl.int32)
        reached = tl.where(step > 0, found, reached)
        threshold += one * step.to(tl.uint32)
        shift -= 2
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
def narrow(histograms, states, source, k, DIGITS: tl.constexpr):
    """The first digits of the k-th highest key, and which of the keys that have them it is, after so many passes. The
    last digit is found here, in every program alike, and noted for the next pass by the first one of axis 2.

    histograms: int32 [sources, 4, 256]; states: int32 [sources, 5, 2]."""
    prefix = 0
    if DIGITS > 1:
        prefix = tl.load(states + source * 10 + 2 * DIGITS - 2)
        k = tl.load(states + source * 10 + 2 * DIGITS - 1)
    if DIGITS > 0:
        digit, k = next_digit(histograms + source * 1024 + (DIGITS - 1) * 256, k)
        prefix = (prefix << 8) | digit
        if tl.program_id(2) == 0:
            tl.store(states + source * 10 + 2 * DIGITS, prefix)
            tl.store(states + source * 10 + 2 * DIGITS + 1, k)
    return prefix, k


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
