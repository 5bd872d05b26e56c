"""The layout of a step's compacted requests, against loops."""

from __future__ import annotations

import pytest
import torch

from attention_plugins.batch import CompactedRow, plan_compacted
from kvcache.pages import PageGeometry, PageTable, TableStore

LAYERS, PAGE = 3, 4


def make_row(
    store: TableStore,
    geometry: PageGeometry,
    first_token: int,
    num_tokens: int,
    most_pages: int,
    blocks: int,
    seed: int,
) -> CompactedRow:
    """A request with random page counts, 6 full prompt blocks and `blocks` blocks since."""
    generator = torch.Generator().manual_seed(seed)
    num_kv_heads = geometry.num_kv_heads
    counts = torch.randint(1, most_pages + 1, (LAYERS, num_kv_heads), generator=generator)
    pool = torch.randperm(1000, generator=generator)[: int(counts.sum())] + 5000
    table = PageTable(geometry, counts, pool, first_block=6, store=store)
    table.append(torch.randperm(100, generator=generator)[:blocks] + 1)
    return CompactedRow(first_token, num_tokens, 6 * PAGE + blocks * PAGE - seed % PAGE, table)


def mixed_rows(num_kv_heads: int) -> list[CompactedRow]:
    """Decodes and longer queries, with rows of other requests between, and not in the order of the batch."""
    shapes = [(3, 1, 2, 1), (4, 5, 9, 3), (20, 1, 1, 12), (10, 3, 4, 1)]
    base = tuple(layer * num_kv_heads for layer in range(LAYERS))
    geometry = PageGeometry(base, LAYERS * num_kv_heads, num_kv_heads, PAGE, 8)
    # Small, and its first slot used before: it has to grow, and leftovers of other requests mean nothing.
    store = TableStore(geometry, torch.device("cpu"), slots=1, width=2)
    make_row(store, geometry, 0, 1, 5, 4, seed=9).table.release()
    return [make_row(store, geometry, *shape, seed=seed) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("num_kv_heads", [1, 2, 5])
@pytest.mark.parametrize("only", [slice(0, 4), slice(0, 1), slice(1, 2), slice(2, 4)], ids=str)
def test_layout(num_kv_heads: int, only: slice) -> None:
    rows = mixed_rows(num_kv_heads)[only]
    batch = plan_compacted(rows, num_kv_heads)

    token_heads, start = [], [0]
    for row in rows:
        for head in range(num_kv_heads):
            for token in range(row.first_token, row.first_token + row.num_tokens):
                token_heads.append(token * num_kv_heads + head)
            start.append(start[-1] + row.num_tokens)
    assert batch.token_heads.tolist() == token_heads and batch.token_heads.dtype == torch.int64
    assert batch.query_start.tolist() == start and batch.query_start.dtype == torch.int32
    assert batch.max_query_len == max(row.num_tokens for row in rows)

    width = max(row.table.rows().shape[-1] for row in rows)
    assert batch.pages.shape == (LAYERS, len(rows) * num_kv_heads, width) and batch.pages.dtype == torch.int32
    assert batch.lengths.shape == (LAYERS, len(rows) * num_kv_heads) and batch.lengths.dtype == torch.int32
    for layer in range(LAYERS):
        for i, row in enumerate(rows):
            for head in range(num_kv_heads):
                sequence = i * num_kv_heads + head
                slots = int(row.table.physical_lengths(row.length)[layer, head])
                assert batch.lengths[layer, sequence] == slots
                pages = row.table.rows()[layer, head, : -(-slots // PAGE)].tolist()
                assert 0 not in pages
                # What follows a row's own pages is never read.
                assert batch.pages[layer, sequence, : len(pages)].tolist() == pages


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (4, 4), (8, 2)])
def test_gathered_queries_are_each_heads_own(num_heads: int, num_kv_heads: int) -> None:
    """[tokens, heads, d] seen as [tokens * KV heads, group, d]: what the attention kernel is given, and back."""
    rows, group = mixed_rows(num_kv_heads), num_heads // num_kv_heads
    queries = torch.randn(30, num_heads, 8)
    batch = plan_compacted(rows, num_kv_heads)
    gathered = queries.view(-1, group, 8)[batch.token_heads]
    for i, row in enumerate(rows):
        for head in range(num_kv_heads):
            first, last = batch.query_start[i * num_kv_heads + head : i * num_kv_heads + head + 2].tolist()
            own = queries[row.first_token : row.first_token + row.num_tokens, head * group : (head + 1) * group]
            assert torch.equal(gathered[first:last], own)

    output = torch.zeros_like(queries)
    output.view(-1, group, 8)[batch.token_heads] = gathered
    seen = torch.zeros(30, dtype=torch.bool)
    for row in rows:
        seen[row.first_token : row.first_token + row.num_tokens] = True
    assert torch.equal(output[seen], queries[seen]) and not output[~seen].any()
