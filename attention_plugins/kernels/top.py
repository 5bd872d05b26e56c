"""`attention_plugins.naive.top_slots` and `top_pages` as kernels.

Up to `_IN_REGISTERS` scores of a row and head are held by one program, from the first look to the last. More are
shared among programs: four launches find the threshold, a digit of 8 bits each, one counts what each program has to
write, and the last one writes it. The last place (the newest token, the last page) has no score and is always chosen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from attention_plugins.decode.rows import DecodeRows, LayerCache, Mode
from attention_plugins.kernels.overlap import after_previous, overlapping
from attention_plugins.kernels.radix import count_digits, narrow, ordered, ranks, scatter, threshold_in_registers
from attention_plugins.kernels.tables import (
    VARYING,
    most_tokens,
    open_row,
    page_at,
    slot_at,
    table_of,
    table_shape,
)

_IN_REGISTERS, _CHUNK = 16384, 8192
_EACH = 16  # scores of a thread; more would not fit `threshold_in_registers`
_SLOTS, _PLACES, _PAGES = 0, 1, 2


@triton.jit
def _open(
    table, layer, modes, want, tokens, starts, into, request, head, width,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, KIND: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Length (0 where nothing is to be done) and table of a row; how many candidates it has, how many of them are
    wanted, its first score's column, its row in the outputs."""
    length, row = open_row(table, layer, request, head, LAYERS, HEADS, PAGE)
    mode = tl.load(modes + request)
    wanted = (mode & want) != 0
    start = tl.load(starts + request)
    if KIND == 2:
        candidates = (length + PAGE - 1) // PAGE - 1
        k = (tl.load(tokens + request) + PAGE - 1) // PAGE - 1
        k = tl.where(wanted, k, candidates)
        wanted = wanted | ((mode & DENSE) != 0)
        start = start // PAGE
        target = request
    else:
        candidates = length - 1
        k = tl.minimum(tl.load(tokens + request), width) - 1
        target = tl.load(into + request)
        wanted = wanted & (target >= 0)
    length = tl.where(wanted, length, 0)
    k = tl.maximum(tl.minimum(k, candidates), 0)
    return length, row, tl.maximum(candidates, 0), k, start, tl.maximum(target, 0) * HEADS + head


@triton.jit
def _value(table, row, place, there, HEADS: tl.constexpr, PAGE: tl.constexpr, KIND: tl.constexpr):
    """What is written for a place."""
    if KIND == 0:
        value = slot_at(table, row, place, there, HEADS, PAGE).to(tl.int32)
    elif KIND == 1:
        value = place
    else:
        value = page_at(table, row, place, there, HEADS)
    return value


@triton.jit
def _finish(
    table, row, length, candidates, k, line, count,
    HEADS: tl.constexpr, PAGE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Write the last place, and how many tokens there are."""
    tl.store(line + k, _value(table, row, candidates, length > 0, HEADS, PAGE, KIND))
    tl.store(count, k * PAGE + length - candidates * PAGE if KIND == 2 else k + 1)


@triton.jit(do_not_specialize=VARYING)
def _top_in_registers(
    table, layer, modes, want, tokens, starts, into, scores, scores_stride, out, out_stride, counts, width,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, KIND: tl.constexpr, DENSE: tl.constexpr,
    N: tl.constexpr, THREADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    request, head = tl.program_id(0), tl.program_id(1)
    if KIND != 2:  # callers may just have written `tokens`
        after_previous(PDL)
    length, row, candidates, k, start, at = _open(
        table, layer, modes, want, tokens, starts, into, request, head, width, LAYERS, HEADS, PAGE, KIND, DENSE
    )  # fmt: skip
    line, place = out + at.to(tl.int64) * out_stride, tl.arange(0, N)
    there = place < candidates
    if KIND == 2:  # scores of pages are written last, after all tables
        after_previous(PDL)
    if length <= 0:
        if KIND == 2:
            tl.store(counts + at, 0)
        return
    if k == candidates:
        tl.store(line + place, _value(table, row, place, there, HEADS, PAGE, KIND), mask=there)
    elif k > 0:
        given = tl.load(scores + head.to(tl.int64) * scores_stride + start + place, mask=there, other=0.0)
        keys = tl.where(there, ordered(given), 0)
        threshold, need = threshold_in_registers(keys, candidates, k, THREADS)
        chosen, rank = ranks(keys > threshold, there & (keys == threshold), need, 15)
        scatter(line, rank, _value(table, row, place, chosen, HEADS, PAGE, KIND), chosen)
    _finish(table, row, length, candidates, k, line, counts + at, HEADS, PAGE, KIND)


@triton.jit
def _chunk(scores, scores_stride, head, start, candidates, N: tl.constexpr):
    """Places of a program's chunk, which of them have a score, and their keys."""
    place = tl.program_id(2) * N + tl.arange(0, N)
    there = place < candidates
    given = tl.load(scores + head.to(tl.int64) * scores_stride + start + place, mask=there, other=0.0)
    return place, there, ordered(given)


@triton.jit(do_not_specialize=VARYING)
def _count_digit(
    table, layer, modes, want, tokens, starts, into, scores, scores_stride, histograms, states, width,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, KIND: tl.constexpr, DENSE: tl.constexpr,
    PASS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Add a chunk's counts of this pass's digit, of keys that have the k-th highest's earlier digits."""
    request, head = tl.program_id(0), tl.program_id(1)
    length, _, candidates, k, start, _ = _open(
        table, layer, modes, want, tokens, starts, into, request, head, width, LAYERS, HEADS, PAGE, KIND, DENSE
    )  # fmt: skip
    if length <= 0 or tl.program_id(2) * N >= candidates or k == candidates or k == 0:
        return
    source = (request * HEADS + head).to(tl.int64)
    _, there, keys = _chunk(scores, scores_stride, head, start, candidates, N)
    prefix, _ = narrow(histograms, states, source, k, PASS)
    if PASS > 0:
        there = there & ((keys >> (32 - 8 * PASS)).to(tl.int32) == prefix)
        if tl.sum(there.to(tl.int32), 0) == 0:
            return
    counts = count_digits(((keys >> (24 - 8 * PASS)) & 255).to(tl.int32), there)
    digit = tl.arange(0, 256)
    tl.atomic_add(histograms + source * 1024 + PASS * 256 + digit, counts, mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=VARYING)
def _count_chosen(
    table, layer, modes, want, tokens, starts, into, scores, scores_stride, histograms, states, found, width,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, KIND: tl.constexpr, DENSE: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """How many of a chunk's keys are above the threshold, and how many equal it."""
    request, head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length, _, candidates, k, start, _ = _open(
        table, layer, modes, want, tokens, starts, into, request, head, width, LAYERS, HEADS, PAGE, KIND, DENSE
    )  # fmt: skip
    if length <= 0 or chunk * N >= candidates or k == candidates or k == 0:
        return
    source = (request * HEADS + head).to(tl.int64)
    _, there, keys = _chunk(scores, scores_stride, head, start, candidates, N)
    prefix, _ = narrow(histograms, states, source, k, 4)
    threshold = prefix.to(tl.uint32, bitcast=True)
    at = found + (source * tl.num_programs(2) + chunk) * 2
    tl.store(at, tl.sum((there & (keys > threshold)).to(tl.int32), 0))
    tl.store(at + 1, tl.sum((there & (keys == threshold)).to(tl.int32), 0))


@triton.jit(do_not_specialize=VARYING)
def _write_chosen(
    table, layer, modes, want, tokens, starts, into, scores, scores_stride, states, found, out, out_stride, counts,
    width,
    LAYERS: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, KIND: tl.constexpr, DENSE: tl.constexpr,
    N: tl.constexpr, CHUNKS_2: tl.constexpr,
):  # fmt: skip
    request, head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length, row, candidates, k, start, at = _open(
        table, layer, modes, want, tokens, starts, into, request, head, width, LAYERS, HEADS, PAGE, KIND, DENSE
    )  # fmt: skip
    if length <= 0:
        if KIND == 2 and chunk == 0:
            tl.store(counts + at, 0)
        return
    line = out + at.to(tl.int64) * out_stride
    if chunk == 0:
        _finish(table, row, length, candidates, k, line, counts + at, HEADS, PAGE, KIND)
    if chunk * N >= candidates or k == 0:
        return
    if k == candidates:
        place = chunk * N + tl.arange(0, N)
        there = place < candidates
        tl.store(line + place, _value(table, row, place, there, HEADS, PAGE, KIND), mask=there)
    else:
        source = (request * HEADS + head).to(tl.int64)
        threshold = tl.load(states + source * 10 + 8).to(tl.uint32, bitcast=True)
        need = tl.load(states + source * 10 + 9)
        place, there, keys = _chunk(scores, scores_stride, head, start, candidates, N)
        other = tl.arange(0, CHUNKS_2)
        before = found + (source * tl.num_programs(2) + other) * 2
        above = tl.sum(tl.load(before, mask=other < chunk, other=0), 0)
        equal = tl.sum(tl.load(before + 1, mask=other < chunk, other=0), 0)
        taken = tl.minimum(equal, need)
        chosen, rank = ranks(there & (keys > threshold), there & (keys == threshold), need - taken, 15)
        tl.store(line + above + taken + rank, _value(table, row, place, chosen, HEADS, PAGE, KIND), mask=chosen)


def _top(
    out: torch.Tensor,
    counts: torch.Tensor,
    scores: torch.Tensor,
    rows: DecodeRows,
    cache: LayerCache,
    want: int,
    into: torch.Tensor | None,
    kind: int,
    most: int,
) -> None:
    """`out`: int32 [rows, width]. `most`: no row has more scores."""
    shape = {**table_shape(rows), "KIND": kind, "DENSE": int(Mode.DENSE)}
    n, heads, width = len(rows), shape["HEADS"], out.shape[1]
    which = (table_of(rows), cache.layer, rows.modes, int(want), rows.tokens, rows.starts, into)
    if most <= _IN_REGISTERS:
        size = max(16, triton.next_power_of_2(most))
        warps = min(32, max(1, size // (32 * _EACH)))
        _top_in_registers[(n, heads)](
            *which, scores, scores.stride(0), out, out.stride(0), counts, width,
            **shape, N=size, THREADS=32 * warps, num_warps=warps, **overlapping(scores.device),
        )  # fmt: skip
        return
    chunks = triton.cdiv(most, _CHUNK)
    grid, given = (n, heads, chunks), (scores, scores.stride(0))
    histograms = torch.zeros(n * heads, 4, 256, dtype=torch.int32, device=scores.device)
    states = torch.empty(n * heads, 5, 2, dtype=torch.int32, device=scores.device)
    found = torch.empty(n * heads, chunks, 2, dtype=torch.int32, device=scores.device)
    size = {"N": _CHUNK, "num_warps": max(1, _CHUNK // 1024)}
    for digit in range(4):
        _count_digit[grid](*which, *given, histograms, states, width, **shape, PASS=digit, **size)
    _count_chosen[grid](*which, *given, histograms, states, found, width, **shape, **size)
    _write_chosen[grid](
        *which, *given, states, found, out, out.stride(0), counts, width,
        **shape, CHUNKS_2=triton.next_power_of_2(chunks), **size,
    )  # fmt: skip


def top_slots(
    slots_out: torch.Tensor,
    counts_out: torch.Tensor,
    scores: torch.Tensor,
    rows: DecodeRows,
    cache: LayerCache,
    want: int,
    into: torch.Tensor,
    as_places: bool = False,
) -> None:
    """See `attention_plugins.naive.top_slots`; the outputs are contiguous."""
    most, kind = min(scores.shape[1], most_tokens(rows)), _PLACES if as_places else _SLOTS
    _top(slots_out.flatten(0, 1), counts_out, scores, rows, cache, want, into, kind, most)


def top_pages(
    pages_out: torch.Tensor,
    lengths_out: torch.Tensor,
    scores: torch.Tensor,
    rows: DecodeRows,
    cache: LayerCache,
    want: int,
) -> None:
    """See `attention_plugins.naive.top_pages`."""
    most = min(scores.shape[1], rows.block_table.shape[1])
    _top(pages_out, lengths_out, scores, rows, cache, want, None, _PAGES, most)
