"""Attention of a few queries, summed by key and by distance.

The softmax's denominators first, split over the keys; then the sums. Keys are read once or twice a launch, by tensor
cores, and nothing that grows with rows times keys is kept but for diagonals: their sums over groups of 32 rows that
follow each other by 32, each group's keys shifted by as much. Logits are in powers of two.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from attention_plugins.kernels.prefill.keys import MAX_SPLITS, PROGRAMS, Paged, fitting, load_keys, load_rows, paged
from attention_plugins.prefill.base import Chunk

STEP = 32
"""Rows of a group, and keys that are looked at together where diagonals are summed."""
DENOMINATORS: dict[str, Any] = {"ROWS": 256, "KEYS": 64, "num_warps": 8, "num_stages": 3}
STRIPES: dict[str, Any] = {"MEMBERS": 4, "num_warps": 8, "num_stages": 4}
FEW_STRIPES: dict[str, Any] = {"MEMBERS": 2, "num_warps": 4, "num_stages": 4}
"""Of models with at most two query heads for each KV head."""
COLUMNS: dict[str, Any] = {"ROWS": 64, "KEYS": 128, "num_warps": 4, "num_stages": 2}
# Numbers that differ from chunk to chunk are no compile-time constants: a new one must not wait for a compiler.
_VARYING = ["width", "m", "splits", "keys_each", "chunks_each", "chunks", "offset", "q_len", "k_len"]


@triton.jit
def _add_powers(
    q, most, total, start, end, last, pages, table, scale,
    PAGE: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, KEYS: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """The largest logit and the sum of powers, with the keys of this range. ALL: all rows see all of whole tiles."""
    for first in range(start, end, KEYS):
        position = first + tl.arange(0, KEYS)
        k = load_keys(pages, table, position, position < end, PAGE, DIM, DIM_2)
        products = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if not ALL:
            seen = (position[None, :] <= last[:, None]) & (position < end)[None, :]
            products = tl.where(seen, products, float("-inf"))
        new = tl.maximum(most, tl.max(products, 1) * scale)
        total = total * tl.exp2(most - new) + tl.sum(tl.exp2(products * scale - new[:, None]), 1)
        most = new
    return most, total


@triton.jit(do_not_specialize=_VARYING)
def _denominators(
    queries, stride, rows, pages, table, width, partial, m, offset, scale, splits, keys_each,
    GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Log2 of the sum of powers over a part of the keys, for each row: rows of a head follow each other."""
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = tile * ROWS + tl.arange(0, ROWS)
    real = place < GROUP * m
    row = tl.load(rows + place % m, mask=real, other=0)
    q = load_rows(queries, stride, row, head * GROUP + place // m, real, DIM, DIM_2)
    last = (offset + row).to(tl.int32)
    most = tl.full([ROWS], -1e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first = split * keys_each
    end = tl.minimum(first + keys_each, tl.max(tl.where(real, last, -1), 0) + 1)
    common = tl.min(tl.where(real, last, 2147483647), 0) + 1  # every row sees the keys before
    clean = tl.maximum(tl.minimum(common, end) - first, 0) // KEYS * KEYS + first
    of = table + head.to(tl.int64) * width
    most, total = _add_powers(q, most, total, first, clean, last, pages, of, scale, PAGE, DIM, DIM_2, KEYS, True)
    most, total = _add_powers(q, most, total, clean, end, last, pages, of, scale, PAGE, DIM, DIM_2, KEYS, False)
    out = (head * GROUP * m + place).to(tl.int64) * splits + split
    tl.store(partial + out, most + tl.log2(total), mask=real)


@triton.jit
def _denominator(partial, row, real, splits, SPLITS: tl.constexpr):
    """Log2 of the softmax's denominators of these rows; infinity where they aren't real."""
    split = tl.arange(0, SPLITS)
    parts = tl.load(
        partial + row.to(tl.int64)[:, None] * splits + split,
        mask=real[:, None] & (split < splits)[None, :], other=float("-inf"),
    )  # fmt: skip
    most = tl.max(tl.where(real[:, None], parts, 0.0), 1)
    found = most + tl.log2(tl.sum(tl.exp2(parts - most[:, None]), 1))
    return tl.where(real, found, float("inf"))


@triton.jit
def _group(
    queries, stride, partial, head, member, number, m, splits, q_len,
    GROUP: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Queries and denominators of some of the last rows."""
    real = (member < GROUP) & (number < m)
    q = load_rows(queries, stride, q_len - m + number, head * GROUP + member, real, DIM, DIM_2)
    return q, _denominator(partial, (head * GROUP + member) * m + number, real, splits, SPLITS)


@triton.jit
def _shares(q, denominator, k, position, last, scale, ALL: tl.constexpr):
    """Attention of rows to keys: [rows, keys]."""
    products = tl.dot(q, tl.trans(k), input_precision="ieee")
    shares = tl.exp2(products * scale - denominator[:, None])
    if not ALL:
        shares = tl.where((position >= 0)[None, :] & (position[None, :] <= last[:, None]), shares, 0.0)
    return shares


@triton.jit
def _add_stripes(
    start, end, shifted_0, shifted_1, shifted_2,
    q_0, q_1, q_2, q_3, lse_0, lse_1, lse_2, lse_3, last,
    pages, table, columns, column, sums, line, k_len, scale, factor,
    GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr,
    MEMBERS: tl.constexpr, STEP: tl.constexpr, GROUPS: tl.constexpr, ALL: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """Columns of keys in steps `start` to `end`, and sums over groups of rows. What is carried from step to step are
    sums that later groups add to: `shifted_j` has those up to group j."""
    for step in range(start, end):
        position = step * STEP + tl.arange(0, STEP)
        there = (position >= 0) & (position < k_len)
        k = load_keys(pages, table, position, there, PAGE, DIM, DIM_2).to(q_0.dtype)
        shares = _shares(q_0, lse_0, k, position, last, scale, ALL)
        together, done = shares, shares
        if GROUPS > 1:
            own = _shares(q_1, lse_1, k, position, last + STEP, scale, ALL)
            together += own
            done = shifted_0 + own
            shifted_0 = shares
        if GROUPS > 2:
            own = _shares(q_2, lse_2, k, position, last + 2 * STEP, scale, ALL)
            together += own
            before = done
            done = shifted_1 + own
            shifted_1 = before
        if GROUPS > 3:
            own = _shares(q_3, lse_3, k, position, last + 3 * STEP, scale, ALL)
            together += own
            before = done
            done = shifted_2 + own
            shifted_2 = before
        if STORE:
            found = tl.sum(tl.reshape(together, [MEMBERS, STEP, STEP]), 1)
            tl.store(columns + column[:, None] + position, found, mask=(column >= 0)[:, None] & there[None, :])
            at = sums + line[:, None] + step * STEP + tl.arange(0, STEP)
            tl.store(at, (done * factor).to(sums.dtype.element_ty), mask=(line >= 0)[:, None])
    return shifted_0, shifted_1, shifted_2


@triton.jit(do_not_specialize=_VARYING)
def _stripes(
    queries, stride, pages, table, width, partial, columns, sums, sums_width, m, q_len, k_len,
    scale, factor, splits, chunks, chunks_each,
    GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, SPLITS: tl.constexpr,
    MEMBERS: tl.constexpr, STEP: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = tl.arange(0, MEMBERS * STEP)
    member, number = tile * MEMBERS + place // STEP, place % STEP
    q_0, lse_0 = _group(queries, stride, partial, head, member, number, m, splits, q_len, GROUP, DIM, DIM_2, SPLITS)
    q_1, q_2, q_3, lse_1, lse_2, lse_3 = q_0, q_0, q_0, lse_0, lse_0, lse_0
    if GROUPS > 1:
        q_1, lse_1 = _group(
            queries, stride, partial, head, member, number + STEP, m, splits, q_len, GROUP, DIM, DIM_2, SPLITS
        )
    if GROUPS > 2:
        q_2, lse_2 = _group(
            queries, stride, partial, head, member, number + 2 * STEP, m, splits, q_len, GROUP, DIM, DIM_2, SPLITS
        )
    if GROUPS > 3:
        q_3, lse_3 = _group(
            queries, stride, partial, head, member, number + 3 * STEP, m, splits, q_len, GROUP, DIM, DIM_2, SPLITS
        )
    last = k_len - m + number
    zeros = tl.zeros([MEMBERS * STEP, STEP], tl.float32)
    of = table + head.to(tl.int64) * width
    own = tile * MEMBERS + tl.arange(0, MEMBERS)
    column = tl.where(own < GROUP, (head * GROUP + own).to(tl.int64) * k_len, -1)
    line = tl.where(member < GROUP, ((head * GROUP + member) * STEP + number).to(tl.int64) * sums_width, -1)
    first = split * chunks_each
    end = tl.minimum(first + chunks_each, chunks)
    clean = tl.maximum(tl.minimum(end, (k_len - m + 1) // STEP), first)
    a, b, c = _add_stripes(
        first - (GROUPS - 1), first, zeros, zeros, zeros, q_0, q_1, q_2, q_3, lse_0, lse_1, lse_2, lse_3, last,
        pages, of, columns, column, sums, line, k_len, scale, factor,
        GROUP, PAGE, DIM, DIM_2, MEMBERS, STEP, GROUPS, False, False,
    )  # fmt: skip
    a, b, c = _add_stripes(
        first, clean, a, b, c, q_0, q_1, q_2, q_3, lse_0, lse_1, lse_2, lse_3, last,
        pages, of, columns, column, sums, line, k_len, scale, factor,
        GROUP, PAGE, DIM, DIM_2, MEMBERS, STEP, GROUPS, True, True,
    )  # fmt: skip
    _add_stripes(
        clean, end, a, b, c, q_0, q_1, q_2, q_3, lse_0, lse_1, lse_2, lse_3, last,
        pages, of, columns, column, sums, line, k_len, scale, factor,
        GROUP, PAGE, DIM, DIM_2, MEMBERS, STEP, GROUPS, False, True,
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def _shear(sums, sums_width, diagonals, m, k_len, factor, STEP: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr):
    """Diagonals of what `_stripes` summed."""
    head = tl.program_id(1)
    distance = tl.program_id(0) * N + tl.arange(0, N)
    place = k_len - m + STEP * (GROUPS - 1) - distance
    total = tl.zeros([N], tl.float32)
    for row in tl.static_range(STEP):
        line = sums + (head * STEP + row).to(tl.int64) * sums_width
        at = place + row
        total += tl.load(line + at, mask=(at >= 0) & (at < sums_width), other=0.0).to(tl.float32)
    tl.store(diagonals + head.to(tl.int64) * k_len + distance, total * factor, mask=distance < k_len)


@triton.jit(do_not_specialize=_VARYING)
def _columns(
    queries, stride, rows, pages, table, width, partial, columns, m, offset, k_len, scale, splits,
    GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    position = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    k = load_keys(pages, table + head.to(tl.int64) * width, position, position < k_len, PAGE, DIM, DIM_2)
    k = k.to(queries.dtype.element_ty)
    for member in range(GROUP):
        total = tl.zeros([KEYS], tl.float32)
        for start in range(0, m, ROWS):
            number = start + tl.arange(0, ROWS)
            real = number < m
            row = tl.load(rows + number, mask=real, other=0)
            q = load_rows(queries, stride, row, head * GROUP + member, real, DIM, DIM_2)
            denominator = _denominator(partial, (head * GROUP + member) * m + number, real, splits, SPLITS)
            shares = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - denominator[None, :])
            seen = position[:, None] <= (offset + row).to(tl.int32)[None, :]
            total += tl.sum(tl.where(seen & real[None, :], shares, 0.0), 1)
        at = (head * GROUP + member).to(tl.int64) * k_len + position
        tl.store(columns + at, total, mask=position < k_len)


class Denominators(NamedTuple):
    """Log2 of sums of powers, and the chunk they are of.

    Attributes:
        partial: float32 [num_heads * m, splits].
        most_splits: a power of two that doesn't depend on the context: another one would be compiled anew.
    """

    partial: torch.Tensor
    given: Paged
    most_splits: int


def denominators(chunk: Chunk, rows: torch.Tensor) -> Denominators:
    """Of the causal softmax of some of the chunk's queries, int64 [m], counted from its start."""
    given, m = paged(chunk), len(rows)
    kv_heads, group = given.heads
    sizes = fitting(DENOMINATORS, given.queries)
    tiles, keys = triton.cdiv(group * m, sizes["ROWS"]), sizes["KEYS"]
    most = max(1, min(PROGRAMS // (kv_heads * tiles), MAX_SPLITS))
    splits = min(triton.cdiv(chunk.k_len, 4 * keys), most)
    keys_each = triton.cdiv(triton.cdiv(chunk.k_len, splits), keys) * keys
    splits = triton.cdiv(chunk.k_len, keys_each)
    partial = torch.empty(chunk.num_heads * m, splits, device=rows.device)
    _denominators[(tiles, kv_heads, splits)](
        given.queries, given.queries.stride(0), rows, given.pages, given.table, given.table.stride(0), partial, m,
        chunk.offset, given.scale, splits, keys_each, **given.shape, **sizes,
    )  # fmt: skip
    return Denominators(partial, given, triton.next_power_of_2(most))


def column_sums(chunk: Chunk, rows: torch.Tensor) -> torch.Tensor:
    """See `attention_plugins.prefill.scores.column_sums`."""
    partial, given, _ = denominators(chunk, rows)
    # Each program needs all rows' denominators: parts are merged once. Logarithms of base 2 stay what they are.
    partial = partial.mul(math.log(2)).logsumexp(-1, keepdim=True).div(math.log(2))
    columns = torch.empty(chunk.num_heads, chunk.k_len, device=rows.device)
    sizes = fitting(COLUMNS, given.queries)
    _columns[(triton.cdiv(chunk.k_len, sizes["KEYS"]), given.heads[0])](
        given.queries, given.queries.stride(0), rows, given.pages, given.table, given.table.stride(0), partial, columns,
        len(rows), chunk.offset, chunk.k_len, given.scale, 1, **given.shape, SPLITS=1, **sizes,
    )  # fmt: skip
    return columns


def last_row_sums(chunk: Chunk, count: int) -> torch.Tensor:
    """See `attention_plugins.prefill.scores.last_row_sums`; at most 128.

    Sums on the way to diagonals are float16 where queries have 16 bits, shares of 1 as 8192.

    Raises:
        ValueError: more than 128 are asked for.
    """
    m = min(count, chunk.q_len)
    groups = triton.next_power_of_2(triton.cdiv(m, STEP))
    if groups > 4:
        raise ValueError(f"at most {4 * STEP} last rows are summed; got {m}")
    partial, given, most_splits = denominators(
        chunk, torch.arange(chunk.q_len - m, chunk.q_len, device=chunk.queries.device)
    )
    (kv_heads, group), k_len = given.heads, chunk.k_len
    found = torch.empty(2, chunk.num_heads, k_len, device=partial.device)
    half = given.queries.element_size() < 4
    steps = triton.cdiv(k_len, STEP) + groups - 1
    sums = torch.empty(
        chunk.num_heads, STEP, steps * STEP, device=partial.device, dtype=torch.float16 if half else torch.float32
    )
    factor = 8192.0 if half else 1.0
    sizes = fitting(STRIPES if group > FEW_STRIPES["MEMBERS"] else FEW_STRIPES, given.queries)
    tiles = triton.cdiv(group, sizes["MEMBERS"])
    splits = max(1, min(steps // 8, PROGRAMS // (kv_heads * tiles)))
    each = triton.cdiv(steps, splits)
    _stripes[(tiles, kv_heads, triton.cdiv(steps, each))](
        given.queries, given.queries.stride(0), given.pages, given.table, given.table.stride(0), partial,
        found[0], sums, sums.shape[2], m, chunk.q_len, k_len, given.scale, factor, partial.shape[1], steps, each,
        **given.shape, SPLITS=most_splits, STEP=STEP, GROUPS=groups, **sizes,
    )  # fmt: skip
    _shear[(triton.cdiv(k_len, 512), chunk.num_heads)](
        sums, sums.shape[2], found[1], m, k_len, 1 / factor, STEP=STEP, GROUPS=groups, N=512, num_warps=4
    )
    return found
