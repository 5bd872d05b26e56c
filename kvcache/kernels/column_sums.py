"""`kvcache.scorers.column_sums` over paged keys: memory grows with the chunk, never with chunk times prompt.

Two launches a layer and chunk: the softmax's denominators, then the sums. Logits are in powers of two.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kvcache.evidence import PagedEvidence
from kvcache.kernels.window_votes import _MAX_SPLITS, _PROGRAMS, _denominators, _load_keys
from kvcache.pages import InterleavedCodec


# Numbers that differ from chunk to chunk are no compile-time constants: a new one must not wait for a compiler.
@triton.jit(do_not_specialize=["width", "length", "chunk"])
def _sums(
    queries, pages, table, denominators, sums, width, length, chunk, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr,
    PAGE: tl.constexpr, DIM: tl.constexpr, DIM_2: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Sum over the chunk of the probabilities, mean over the group, for each KV head and key."""
    head, tile = tl.program_id(0), tl.program_id(1) * KEYS
    position = tile + tl.arange(0, KEYS)
    k = _load_keys(pages, table + head * width, position, length, PAGE, DIM, DIM_2)
    dim = tl.arange(0, DIM_2)
    before = length - chunk
    total = tl.zeros([KEYS], tl.float32)
    for member in range(GROUP):
        for start in range(tl.maximum(tile - before, 0), chunk, ROWS):
            query = start + tl.arange(0, ROWS)
            real = query < chunk
            at = (query.to(tl.int64) * HEADS * GROUP + head * GROUP + member) * DIM
            q = tl.load(queries + at[:, None] + dim, mask=real[:, None] & (dim < DIM), other=0.0)
            row = (head * GROUP + member) * chunk + query
            denominator = tl.load(denominators + row, mask=real, other=0.0)
            logits = tl.dot(k.to(q.dtype), tl.trans(q)) * scale
            seen = real[None, :] & (position[:, None] <= before + query[None, :])
            total += tl.sum(tl.where(seen, tl.exp2(logits - denominator[None, :]), 0.0), 1)
    tl.store(sums + head.to(tl.int64) * length + position, total / GROUP, mask=position < length)


def column_sums_paged(evidence: PagedEvidence, queries: torch.Tensor, first: int) -> torch.Tensor:
    """See `kvcache.scorers.observed_column_sums`.

    bf16 and fp16 keys and queries are multiplied as they are, fp8 ones as bf16; sums are float32, in the same order
    every time.

    Returns:
        float32 [num_kv_heads, first + m].

    Raises:
        ValueError: the cache isn't laid out token by token.
    """
    if not isinstance(evidence.codec, InterleavedCodec):
        raise ValueError(f"the kernels read an InterleavedCodec's pages, not {type(evidence.codec).__name__}'s")
    g, pages = evidence.geometry, evidence.pages
    num_kv_heads, _, dim = evidence.shape
    chunk, num_heads, _ = queries.shape
    group, length = num_heads // num_kv_heads, first + chunk
    if pages.element_size() == 1:
        pages = pages.view(torch.float8_e4m3fn)
    if queries.element_size() == 1:
        queries = queries.view(torch.float8_e4m3fn).to(torch.bfloat16)
    queries = queries.contiguous()
    dim_2 = max(16, triton.next_power_of_2(dim))
    rows, keys = 128 if dim_2 <= 128 else 64, 64
    tiles = triton.cdiv(group * chunk, rows)
    splits = max(1, min(triton.cdiv(length, 8 * keys), _PROGRAMS // (num_kv_heads * tiles), _MAX_SPLITS))
    keys_each = triton.cdiv(triton.cdiv(length, splits), keys) * keys
    splits = triton.cdiv(length, keys_each)
    partial = torch.empty(num_heads * chunk, splits, device=pages.device)
    sums = torch.empty(num_kv_heads, length, device=pages.device)
    table = evidence.page_table
    width = table.stride(0)
    scale = evidence.scale * evidence.quant.query * evidence.quant.key * math.log2(math.e)
    shape = {"HEADS": num_kv_heads, "GROUP": group, "PAGE": g.page_size, "DIM": dim, "DIM_2": dim_2}
    _denominators[(num_kv_heads, tiles, splits)](
        queries, pages, table, partial, width, length, chunk, scale, splits, keys_each,
        ROWS=rows, KEYS=keys, **shape, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        most = partial.amax(1, keepdim=True)
        partial = most + (partial - most).exp2().sum(1, keepdim=True).log2()
    tile, step = (128, 64) if dim_2 <= 128 else (64, 32)
    _sums[(num_kv_heads, triton.cdiv(length, tile))](
        queries, pages, table, partial, sums, width, length, chunk, scale,
        ROWS=step, KEYS=tile, **shape, num_warps=4 if dim_2 <= 64 else 8,
    )  # fmt: skip
    return sums


def warm_up(evidence: PagedEvidence) -> None:
    """Compile the kernels for prompts of the running cache; any of its evidence with a window's queries will do."""
    assert evidence.raw_queries is not None
    column_sums_paged(evidence, evidence.raw_queries, evidence.shape[1] - len(evidence.raw_queries))
