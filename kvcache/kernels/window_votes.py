"""`kvcache.scorers.window_attention` over paged keys: memory grows with the prompt, never with its square.

Three launches a layer: the softmax's denominators, the votes of every query head, pooling and group reduction.
Logits are in powers of two.
"""

from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvcache.evidence import PagedEvidence
from kvcache.pages import InterleavedCodec

_PROGRAMS = 264  # two for each multiprocessor of an H100
_MAX_SPLITS = 64


@triton.jit
def _load_keys(
    pages, table, position, length,
    PAGE: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr,
):  # fmt: skip
    """Keys of these positions: [positions, DIM_2]; zeros behind `length`. `table`: the head's pages, int64."""
    there = position < length
    page = tl.load(table + position // PAGE, mask=there, other=0)
    at = (page * PAGE + position % PAGE) * (2 * DIM)
    dim = tl.arange(0, DIM_2)
    return tl.load(pages + at[:, None] + dim, mask=there[:, None] & (dim < DIM), other=0.0)


# Numbers that differ from request to request are no compile-time constants: a new one must not wait for a compiler.
_VARYING = ["width", "length", "keys_each", "splits", "window", "n", "kernel"]


@triton.jit(do_not_specialize=_VARYING)
def _denominators(
    queries, pages, table, partial, width, length, window, scale, splits, keys_each,
    HEADS: tl.constexpr, GROUP: tl.constexpr,
    PAGE: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Log2 of the sum of exponentials of a part of the keys, for each row (query head of the group, query)."""
    head, split = tl.program_id(0), tl.program_id(2)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    real = row < GROUP * window
    member, query = row // window, row % window
    dim = tl.arange(0, DIM_2)
    at = (query * HEADS * GROUP + head * GROUP + member) * DIM
    q = tl.load(queries + at[:, None] + dim, mask=real[:, None] & (dim < DIM), other=0.0)
    last = length - window + query
    most = tl.full([ROWS], -1e38, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first = split * keys_each
    end = tl.max(tl.where(real, last, 0), 0) + 1  # no row sees a key from here on
    for start in range(first, tl.minimum(first + keys_each, end), KEYS):
        position = start + tl.arange(0, KEYS)
        k = _load_keys(pages, table + head * width, position, length, PAGE, DIM, DIM_2)
        logits = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
        seen = position[None, :] <= last[:, None]
        new = tl.maximum(most, tl.max(tl.where(seen, logits, -1e38), 1))
        power = tl.where(seen, tl.exp2(logits - new[:, None]), 0.0)
        total = total * tl.exp2(most - new) + tl.sum(power, 1)
        most = new
    out = (head * GROUP * window + row) * splits + split
    tl.store(partial + out, most + tl.log2(total), mask=real)


@triton.jit(do_not_specialize=_VARYING)
def _votes(
    queries, pages, table, partial, votes, width, length, window, scale, splits,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, MAX_WINDOW: tl.constexpr,
    PAGE: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Mean or maximum over the window of the probabilities, for each query head and key before the window."""
    head = tl.program_id(0)
    position = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    k = _load_keys(pages, table + head * width, position, length, PAGE, DIM, DIM_2)
    dim, split = tl.arange(0, DIM_2), tl.arange(0, SPLITS)
    before = length - window
    for member in range(GROUP):
        vote = tl.zeros([KEYS], tl.float32)
        for start in range(0, window, ROWS):
            query = start + tl.arange(0, ROWS)
            real = query < window
            at = (query * HEADS * GROUP + head * GROUP + member) * DIM
            q = tl.load(queries + at[:, None] + dim, mask=real[:, None] & (dim < DIM), other=0.0)
            row = (head * GROUP + member) * window + query
            parts = tl.load(
                partial + row[:, None] * splits + split, mask=real[:, None] & (split < splits), other=float("-inf")
            )
            most = tl.max(tl.where(real[:, None], parts, 0.0), 1)
            denominator = most + tl.log2(tl.sum(tl.exp2(parts - most[:, None]), 1))
            logits = tl.dot(k.to(q.dtype), tl.trans(q), input_precision="ieee") * scale
            power = tl.where(real, tl.exp2(logits - denominator), 0.0)
            if MAX_WINDOW:  # a maximum over an axis drops NaNs; a sum doesn't
                peak = tl.max(power, 1) + 0.0 * tl.sum(power, 1)
                vote = tl.maximum(vote, peak, propagate_nan=tl.PropagateNan.ALL)
            else:
                vote += tl.sum(power, 1)
        out = (head * GROUP + member).to(tl.int64) * before + position
        tl.store(votes + out, vote if MAX_WINDOW else vote / window, mask=position < before)


@triton.jit(do_not_specialize=_VARYING)
def _pool(
    votes, scores, n, kernel,
    GROUP: tl.constexpr, MAX_POOL: tl.constexpr, REDUCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pooling over positions, then the group's query heads to their KV head. REDUCE: 0 sum, 1 mean, 2 max."""
    head = tl.program_id(0)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    result = tl.zeros([BLOCK], tl.float32)
    for member in range(GROUP):
        row = votes + (head * GROUP + member).to(tl.int64) * n
        pooled = tl.zeros([BLOCK], tl.float32)
        for offset in range(kernel):
            at = position + offset - kernel // 2
            value = tl.load(row + at, mask=(at >= 0) & (at < n), other=0.0)
            if MAX_POOL:
                pooled = tl.maximum(pooled, value, propagate_nan=tl.PropagateNan.ALL)
            else:
                pooled += value
        if not MAX_POOL:
            pooled = pooled / kernel
        if REDUCE == 2:
            result = tl.maximum(result, pooled, propagate_nan=tl.PropagateNan.ALL)
        else:
            result += pooled
    if REDUCE == 1:
        result = result / GROUP
    tl.store(scores + head.to(tl.int64) * n + position, result, mask=position < n)


class Denominators(NamedTuple):
    """What `denominators` gives, and what a kernel that goes on from there needs.

    Attributes:
        queries, pages: as kernels read them: fp8 pages typed as such, fp8 queries as bf16.
        partial: float32 [num_heads * m, splits], log2 of the sum of exponentials over each part of the keys, a row for
            each query head and query.
        scale: what logits are multiplied with, powers of two.
        shape: compile-time constants.
    """

    queries: torch.Tensor
    pages: torch.Tensor
    partial: torch.Tensor
    scale: float
    shape: dict[str, int]


def denominators(evidence: PagedEvidence, queries: torch.Tensor, length: int) -> Denominators:
    """Of the causal softmax of m queries, the last of the first `length` tokens: the first launch of votes and sums.

    Args:
        queries: [m, num_heads, head_dim], as recorded.

    Raises:
        ValueError: the cache isn't laid out token by token.
    """
    if not isinstance(evidence.codec, InterleavedCodec):
        raise ValueError(f"the kernels read an InterleavedCodec's pages, not {type(evidence.codec).__name__}'s")
    num_kv_heads, _, dim = evidence.shape
    m, num_heads, _ = queries.shape
    group, pages = num_heads // num_kv_heads, evidence.pages
    if pages.element_size() == 1:
        pages = pages.view(torch.float8_e4m3fn)
    if queries.element_size() == 1:
        queries = queries.view(torch.float8_e4m3fn).to(torch.bfloat16)
    queries = queries.contiguous()
    dim_2 = max(16, triton.next_power_of_2(dim))
    rows, keys = 128 if dim_2 <= 128 else 64, 64
    tiles = triton.cdiv(group * m, rows)
    splits = max(1, min(triton.cdiv(length, 8 * keys), _PROGRAMS // (num_kv_heads * tiles), _MAX_SPLITS))
    keys_each = triton.cdiv(triton.cdiv(length, splits), keys) * keys
    splits = triton.cdiv(length, keys_each)
    partial = torch.empty(num_heads * m, splits, device=pages.device)
    scale = evidence.scale * evidence.quant.query * evidence.quant.key * math.log2(math.e)
    page = evidence.geometry.page_size
    shape = {"HEADS": num_kv_heads, "GROUP": group, "PAGE": page, "DIM": dim, "DIM_2": dim_2}
    table = evidence.page_table
    _denominators[(num_kv_heads, tiles, splits)](
        queries, pages, table, partial, table.stride(0), length, m, scale, splits, keys_each,
        ROWS=rows, KEYS=keys, **shape, num_warps=4,
    )  # fmt: skip
    return Denominators(queries, pages, partial, scale, shape)


def window_probabilities_paged(evidence: PagedEvidence, window_reduce: str = "mean") -> torch.Tensor:
    """See `kvcache.scorers.window_probabilities`.

    bf16 and fp16 keys and queries are multiplied as they are, fp8 ones as bf16; sums are float32.

    Returns:
        float32 [num_heads, prompt_len - w].

    Raises:
        ValueError: the evidence has no queries, or the cache isn't laid out token by token.
    """
    if evidence.raw_queries is None:
        raise ValueError("the prompt's last queries are needed and were not kept")
    num_kv_heads, length, _ = evidence.shape
    window, num_heads, _ = evidence.raw_queries.shape
    before = length - window
    soft = denominators(evidence, evidence.raw_queries, length)
    votes, table = torch.empty(num_heads, before, device=evidence.device), evidence.page_table
    _votes[(num_kv_heads, triton.cdiv(before, 128))](
        soft.queries, soft.pages, table, soft.partial, votes, table.stride(0), length, window, soft.scale,
        soft.partial.shape[1],
        SPLITS=_MAX_SPLITS, MAX_WINDOW=window_reduce == "max", **soft.shape,
        ROWS=32, KEYS=128, num_warps=4,
    )  # fmt: skip
    return votes


def pool_votes(votes: torch.Tensor, num_kv_heads: int, *, pooling: str, kernel: int, group_reduce: str) -> torch.Tensor:
    """`kvcache.scorers.pool` and then `reduce_group`.

    Args:
        votes: float32 [num_heads, n], not negative (or NaN).

    Returns:
        float32 [num_kv_heads, n].
    """
    num_heads, n = votes.shape
    scores = torch.empty(num_kv_heads, n, device=votes.device)
    _pool[(num_kv_heads, triton.cdiv(n, 1024))](
        votes, scores, n, 1 if pooling == "none" else kernel,
        GROUP=num_heads // num_kv_heads, MAX_POOL=pooling == "max",
        REDUCE={"sum": 0, "mean": 1, "max": 2}[group_reduce], BLOCK=1024,
    )  # fmt: skip
    return scores


def window_votes_paged(
    evidence: PagedEvidence, *, pooling: str, kernel: int, group_reduce: str, window_reduce: str = "mean"
) -> torch.Tensor:
    """Both, one after the other: `kvcache.scorers.window_votes`, groups reduced after the softmax."""
    votes = window_probabilities_paged(evidence, window_reduce)
    return pool_votes(votes, evidence.shape[0], pooling=pooling, kernel=kernel, group_reduce=group_reduce)


def warm_up(evidence: PagedEvidence) -> None:
    """Compile every kernel that requests may ask for; any evidence of the running cache will do."""
    for window_reduce, pooling, group_reduce in product(("mean", "max"), ("avg", "max"), ("mean", "max", "sum")):
        window_votes_paged(evidence, pooling=pooling, kernel=3, group_reduce=group_reduce, window_reduce=window_reduce)
