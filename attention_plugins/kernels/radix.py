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
def threshold_in_registers(keys, n, k, THREADS: tl.constexpr):
    """A number that k keys reach or, where keys are equal, as few more as can be; and how many of the keys that equal
    it are among the k highest.

    uint32 [N], N a power of two, at least 4 and at most 16 * THREADS, a power of two itself. The first n are keys of
    scores, n >= k >= 1; the others are 0, which no score's key is. An interval that has the k-th highest is cut in four
    until it is one number, or exactly k keys reach its lower end: their own last bits don't matter.
    """
    # A thread has four neighbours at a time: what is added or compared first lies in its own registers.
    N: tl.constexpr = keys.shape[0]
    WIDTH: tl.constexpr = 4 * THREADS if 4 * THREADS < N else N
    WARP: tl.constexpr = 128 if WIDTH > 128 else WIDTH
    keys = tl.reshape(keys, [N // WIDTH, WIDTH])
    most = tl.max(tl.reshape(tl.max(keys, 0), [WIDTH // 4, 4]), 1)
    lowest = tl.where(keys > 0, keys, 0xFFFFFFFF).to(tl.uint32)
    lowest = tl.min(tl.reshape(tl.min(lowest, 0), [WIDTH // 4, 4]), 1)
    # As many keys as threads have some reach the smallest of the threads' highest.
    lowest = tl.where((k <= tl.minimum(n, WIDTH) // 4) & (most > 0), most, lowest)
    low, high = tl.min(lowest, 0), tl.max(most, 0)
    reached = -1
    while (low < high) & (reached != k):
        step = (high - low) // 4 + 1
        # Counts side by side: 10 bits each suffice for a warp's 512 keys.
        counts = (keys >= low + step).to(tl.int32) + ((keys >= low + 2 * step).to(tl.int32) << 10)
        counts = tl.sum(counts + ((keys >= low + 3 * step).to(tl.int32) << 20), 0)
        counts = tl.sum(tl.reshape(counts, [WIDTH // WARP, WARP]), 1).to(tl.int64)
        counts = (counts & 1023) | ((counts << 10) & (1023 << 20)) | ((counts << 20) & (1023 << 40))
        counts = tl.sum(counts, 0)
        lows, middles, highs = counts & 0xFFFFF, (counts >> 20) & 0xFFFFF, counts >> 40
        steps = tl.where(highs >= k, 3, tl.where(middles >= k, 2, tl.where(lows >= k, 1, 0)))
        found = tl.where(highs >= k, highs, tl.where(middles >= k, middles, lows)).to(tl.int32)
        reached = tl.where(steps > 0, found, reached)
        low += steps.to(tl.uint32) * step
        high = tl.minimum(high, low + step - 1)
    return low, k - tl.sum(tl.sum((keys > low).to(tl.int32), 0), 0)


@triton.jit
def scatter(line, index, values, mask):
    """Store [n] values, n a multiple of 4, at any places of a line.

    By every fourth: neighbours that are one thread's stay its own, where a single store would first hand all to others.
    """
    N: tl.constexpr = index.shape[0]
    indices, numbers, masks = _fourths(index, N), _fourths(values, N), _fourths(mask, N)
    for one in tl.static_range(4):
        tl.store(line + indices[one], numbers[one], mask=masks[one])


@triton.jit
def _fourths(tensor, N: tl.constexpr):
    even, odd = tl.split(tl.reshape(tensor, [N // 4, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


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
