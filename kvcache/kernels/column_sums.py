"""`kvcache.scorers.column_sums` over paged keys: memory grows with the chunk, never with chunk times prompt.

Two launches a layer and chunk: the softmax's denominators, then the sums. Logits are in powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvcache.evidence import PagedEvidence
from kvcache.kernels.window_votes import _load_keys, denominators


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
            logits = tl.dot(k.to(q.dtype), tl.trans(q), input_precision="ieee") * scale
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
    num_kv_heads, length = evidence.shape[0], first + len(queries)
    soft = denominators(evidence, queries, length)
    sums = torch.empty(num_kv_heads, length, device=evidence.device)
    partial = soft.partial
    if partial.shape[1] > 1:
        most = partial.amax(1, keepdim=True)
        partial = most + (partial - most).exp2().sum(1, keepdim=True).log2()
    dim_2, table = soft.shape["DIM_2"], evidence.page_table
    tile, step = (128, 64) if dim_2 <= 128 else (64, 32)
    _sums[(num_kv_heads, triton.cdiv(length, tile))](
        soft.queries, soft.pages, table, partial, sums, table.stride(0), length, len(queries), soft.scale,
        ROWS=step, KEYS=tile, **soft.shape, num_warps=4 if dim_2 <= 64 else 8,
    )  # fmt: skip
    return sums


def warm_up(evidence: PagedEvidence) -> None:
    """Compile the kernels for prompts of the running cache; any of its evidence with a window's queries will do."""
    assert evidence.raw_queries is not None
    column_sums_paged(evidence, evidence.raw_queries, evidence.shape[1] - len(evidence.raw_queries))
