"""`attention_plugins.naive.slot_attention` and `page_attention` as two kernels: parts of each list, then their sum."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from attention_plugins.decode.rows import DecodeRows, LayerCache
from attention_plugins.kernels.overlap import after_previous, overlapping
from attention_plugins.kernels.tables import VARYING, contents_of, load_queries, nan_first, typed_queries

_TOKENS, _PAGE_TOKENS, _LOGITS, _MAX_SPLITS = 64, 32, 1024, 64
_WARPS, _STAGES = 4, 3
_PROGRAMS = 528  # four for each multiprocessor of an H100


@triton.jit
def _tokens_each(count, splits, TOKENS: tl.constexpr):
    """Tokens that each split reads, but the last that reads any."""
    return tl.maximum((count + splits * TOKENS - 1) // (splits * TOKENS), 1) * TOKENS


@triton.jit
def _list_of(modes, want, counts, into, request, head, HEADS: tl.constexpr):
    """Which list is a row's, its length, and whether the row is wanted."""
    mode, target = tl.load(modes + request), request if into is None else tl.load(into + request)
    at = tl.maximum(target, 0) * HEADS + head
    return at, tl.load(counts + at), ((mode & want) != 0) & (target >= 0)


@triton.jit(do_not_specialize=VARYING)
def _attend(
    modes, want, queries, queries_stride, contents, slots, slots_stride, counts, into, sums, soft, raw, raw_stride,
    scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_2: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr,
    FP8: tl.constexpr, TOKENS: tl.constexpr, PAGE: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Part of a list: the sum of values, the largest logit (a power of two) and the sum of powers, by query head."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if EARLY:
        q = load_queries(queries, queries_stride, request, head, GROUP, GROUP_2, DIM, DIM_2, FP8)
    after_previous(PDL)
    at, count, wanted = _list_of(modes, want, counts, into, request, head, HEADS)
    splits, count = tl.num_programs(2), tl.where(wanted, count, 0)
    each = _tokens_each(count, splits, TOKENS)
    end = tl.minimum(count, (split + 1) * each)
    if split * each >= end:
        return
    if not EARLY:
        q = load_queries(queries, queries_stride, request, head, GROUP, GROUP_2, DIM, DIM_2, FP8)
    member, dim = tl.arange(0, GROUP_2), tl.arange(0, DIM_2)
    real, row = member < GROUP, request * HEADS + head
    listed = slots + at.to(tl.int64) * slots_stride
    most = tl.full([GROUP_2], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_2], tl.float32)
    acc = tl.zeros([GROUP_2, DIM_2], tl.float32)
    for first in range(split * each, end, TOKENS):
        index = first + tl.arange(0, TOKENS)
        there = index < end
        if PAGE == 1:
            slot = tl.load(listed + index, mask=there, other=0).to(tl.int64)
        else:
            slot = tl.load(listed + index // PAGE, mask=there, other=0).to(tl.int64) * PAGE + index % PAGE
        key, mask = contents + slot[:, None] * (2 * DIM) + dim, there[:, None] & (dim < DIM)
        k = tl.load(key, mask=mask, other=0.0).to(q.dtype)
        v = tl.load(key + DIM, mask=mask, other=0.0).to(q.dtype)
        logits = tl.dot(q, tl.trans(k)) * scale
        if raw is not None:
            line = raw + (row * GROUP + member).to(tl.int64) * raw_stride
            tl.store(line[:, None] + index, logits, mask=real[:, None] & there)
        logits = tl.where(there, logits, float("-inf"))
        new = tl.maximum(most, tl.max(logits, 1))
        power, shrink = tl.exp2(logits - new[:, None]), tl.exp2(most - new)
        total = total * shrink + tl.sum(power, 1)
        acc = tl.dot(power.to(v.dtype), v, acc=acc * shrink[:, None])
        most = new
    part = ((row * splits + split) * GROUP + member).to(tl.int64)
    tl.store(soft + part * 2, most, mask=real)
    tl.store(soft + part * 2 + 1, total, mask=real)
    tl.store(sums + part[:, None] * DIM + dim, acc, mask=real[:, None] & (dim < DIM))


@triton.jit
def _denominator(soft, row, splits, used, member, GROUP: tl.constexpr, SPLITS_2: tl.constexpr):
    """Each split's weight in the sum of values, and the base-2 logarithm of the softmax's denominator."""
    split = tl.arange(0, SPLITS_2)
    part = soft + ((row * splits + split) * GROUP + member).to(tl.int64) * 2
    most = tl.load(part, mask=split < used, other=float("-inf"))
    total = tl.load(part + 1, mask=split < used, other=0.0)
    largest = tl.max(most, 0)
    weight = tl.exp2(most - largest)
    denominator = largest + tl.log2(tl.sum(total * weight, 0))
    return tl.exp2(most - denominator), denominator


@triton.jit(do_not_specialize=VARYING)
def _combine(
    modes, want, counts, into, sums, soft, raw, raw_stride, out, out_stride, logits, logits_stride, splits, factor,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr,
    TOKENS: tl.constexpr, SPLITS_2: tl.constexpr, LOGITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs of the third axis: one for each of the group's query heads, and then the log-probabilities' chunks."""
    request, head, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # `_attend` has written none of these, and let this kernel in after what has.
    _at, count, wanted = _list_of(modes, want, counts, into, request, head, HEADS)
    row = request * HEADS + head
    after_previous(PDL)
    if not wanted:
        return
    each = _tokens_each(count, splits, TOKENS)
    used = (count + each - 1) // each
    if program < GROUP:
        weight, _ = _denominator(soft, row, splits, used, program, GROUP, SPLITS_2)
        split, dim = tl.arange(0, SPLITS_2), tl.arange(0, DIM_2)
        part = ((row * splits + split) * GROUP + program).to(tl.int64)
        mask = (split < used)[:, None] & (dim < DIM)
        acc = tl.load(sums + part[:, None] * DIM + dim, mask=mask, other=0.0)
        result = tl.sum(acc * tl.where(split < used, weight, 0.0)[:, None], 0) * factor
        place = out + request.to(tl.int64) * out_stride + (head * GROUP + program) * DIM + dim
        tl.store(place, result.to(out.dtype.element_ty), mask=dim < DIM)
    elif raw is not None:
        index = (program - GROUP) * LOGITS + tl.arange(0, LOGITS)
        if (program - GROUP) * LOGITS >= count:
            return
        best = tl.full([LOGITS], float("-inf"), tl.float32)
        for member in range(GROUP):
            _, denominator = _denominator(soft, row, splits, used, member, GROUP, SPLITS_2)
            line = raw + (row * GROUP + member).to(tl.int64) * raw_stride
            given = tl.load(line + index, mask=index < count, other=0.0) - denominator
            best = tl.maximum(best, nan_first(given))
        line = logits + row.to(tl.int64) * logits_stride
        tl.store(line + index, best * 0.6931471805599453, mask=index < count)


def slot_attention(
    out: torch.Tensor,
    queries: torch.Tensor,
    slots: torch.Tensor,
    counts: torch.Tensor,
    into: torch.Tensor,
    rows: DecodeRows,
    cache: LayerCache,
    want: int,
    logits: torch.Tensor | None = None,
) -> None:
    """See `attention_plugins.naive.slot_attention`; `slots`, `counts` and `logits` are contiguous, `out` but for gaps
    between its rows.

    Raises:
        ValueError: `out` has other gaps, or the cache isn't laid out token by token.
    """
    _attend_lists(out, queries, slots, slots.shape[-1], counts, into, rows, cache, want, logits, 1)


def page_attention(
    out: torch.Tensor,
    queries: torch.Tensor,
    pages: torch.Tensor,
    lengths: torch.Tensor,
    rows: DecodeRows,
    cache: LayerCache,
    want: int,
    most: int,
) -> None:
    """See `attention_plugins.naive.page_attention`; what `slot_attention` says of the tensors holds here too."""
    _attend_lists(out, queries, pages, most, lengths, None, rows, cache, want, None, cache.geometry.page_size)


def _attend_lists(
    out: torch.Tensor,
    queries: torch.Tensor,
    lists: torch.Tensor,
    width: int,
    counts: torch.Tensor,
    into: torch.Tensor | None,
    rows: DecodeRows,
    cache: LayerCache,
    want: int,
    logits: torch.Tensor | None,
    page: int,
) -> None:
    """`lists` are of pages of so many tokens, `width` is the most tokens that one stands for."""
    n, heads, group, dim = out.shape
    if out.stride()[1:] != (group * dim, dim, 1):
        raise ValueError(f"a row of `out` must have no gaps; its strides are {out.stride()}")
    contents, given, (queries, scale, widths) = contents_of(cache), queries.data_ptr(), typed_queries(cache, queries)
    # Lists of pages are chosen by the queries, so these are older than the kernel ahead, unless they were just copied.
    early = page > 1 and queries.data_ptr() == given
    fp8 = contents.element_size() == 1
    scale *= cache.scale * (cache.quant.key if fp8 else 1.0) * math.log2(math.e)
    among = heads if cache.invariant else n * heads
    tokens = _TOKENS if page == 1 else _PAGE_TOKENS
    splits = max(1, min(triton.cdiv(width, tokens), _PROGRAMS // among, _MAX_SPLITS))
    overlap = overlapping(out.device)
    soft = torch.empty(n * heads, splits, group, 2, device=out.device)
    sums = torch.empty(n * heads, splits, group, dim, device=out.device)
    raw = None if logits is None else torch.empty(n * heads * group, width, device=out.device)
    _attend[(n, heads, splits)](
        rows.modes, int(want), queries, queries.stride(0), contents, lists, lists.stride(-2), counts, into,
        sums, soft, raw, width, scale,
        HEADS=heads, **widths, TOKENS=tokens, PAGE=page, EARLY=early, num_warps=_WARPS, num_stages=_STAGES,
        **overlap,
    )  # fmt: skip
    chunks = 0 if logits is None else triton.cdiv(width, _LOGITS)
    _combine[(n, heads, group + chunks)](
        rows.modes, int(want), counts, into, sums, soft, raw, width, out, out.stride(0),
        logits, width, splits, cache.quant.value if fp8 else 1.0,
        HEADS=heads, GROUP=group, DIM=dim, DIM_2=widths["DIM_2"],
        TOKENS=tokens, SPLITS_2=triton.next_power_of_2(splits), LOGITS=_LOGITS, num_warps=4, **overlap,
    )  # fmt: skip
