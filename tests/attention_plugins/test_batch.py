"""The layout of a step's compacted requests, against loops."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from attention_plugins.batch import CompactedBatch, plan_compacted
from attention_plugins.page_rows import page_rows
from kvcache.pages import PageGeometry
from kvcache.tables import PageTables

LAYERS, PAGE = 3, 4


@dataclass(frozen=True)
class Row:
    """One request of a batch: its query tokens in this step, its logical length, its table's slot or -1."""

    num_tokens: int
    length: int
    slot: int
    blocks: list[int]


@dataclass(frozen=True)
class Batch:
    """Decodes and longer queries, compacted or not."""

    tables: PageTables
    rows: list[Row]

    @property
    def starts(self) -> list[int]:
        return [sum(row.num_tokens for row in self.rows[:i]) for i in range(len(self.rows) + 1)]

    @property
    def compacted(self) -> list[tuple[int, Row]]:
        """(first query token, row)."""
        return [(first, row) for first, row in zip(self.starts, self.rows, strict=False) if row.slot >= 0]

    def plan(self) -> CompactedBatch:
        return plan_compacted(
            np.array([row.slot for row in self.rows], dtype=np.int32),
            np.array(self.starts, dtype=np.int32),
            torch.tensor([row.length for row in self.rows], dtype=torch.int32),
            torch.tensor([row.blocks for row in self.rows], dtype=torch.int32),
            self.tables.geometry.num_kv_heads,
        )


def make_batch(num_kv_heads: int, shapes: list[tuple[int, int]]) -> Batch:
    """Rows of (query tokens, target blocks), no target blocks for a row that isn't compacted."""
    base = tuple(layer * num_kv_heads for layer in range(LAYERS))
    geometry = PageGeometry(base, LAYERS * num_kv_heads, num_kv_heads, PAGE, 8)
    tables = PageTables(geometry, slots=6, width=9)
    generator = torch.Generator().manual_seed(len(shapes))
    rows = []
    for num_tokens, num_blocks in shapes:
        blocks = (torch.randperm(100, generator=generator)[:20] + 1).tolist()
        slot = -1
        if num_blocks:
            pages = num_blocks * LAYERS * num_kv_heads
            owners = torch.randint(0, LAYERS * num_kv_heads, (pages,), generator=generator)
            counts = torch.bincount(owners, minlength=LAYERS * num_kv_heads).view(LAYERS, num_kv_heads)
            target = torch.randperm(900, generator=generator)[:num_blocks] + 200
            slot = tables.take(counts, target, first_block=6)
        rows.append(Row(num_tokens, int(torch.randint(6 * PAGE + 1, 20 * PAGE, (), generator=generator)), slot, blocks))
    return Batch(tables, rows)


SHAPES = {
    "mixed": [(2, 0), (1, 2), (7, 9), (3, 0), (1, 0), (3, 4), (1, 1), (6, 0)],
    "decodes": [(1, 1), (1, 9), (1, 3)],
    "one": [(1, 2)],
    "one long": [(4, 0), (5, 9)],
    "first and last": [(2, 3), (9, 0), (1, 2)],
}
MIXES = pytest.mark.parametrize("mix", SHAPES)


@MIXES
@pytest.mark.parametrize("num_kv_heads", [1, 2, 5])
def test_layout(num_kv_heads: int, mix: str) -> None:
    batch = make_batch(num_kv_heads, SHAPES[mix])
    planned, compacted = batch.plan(), batch.compacted

    token_heads, start = [], [0]
    for first, row in compacted:
        for head in range(num_kv_heads):
            for token in range(first, first + row.num_tokens):
                token_heads.append(token * num_kv_heads + head)
            start.append(start[-1] + row.num_tokens)
    assert planned.token_heads is not None
    assert planned.token_heads.tolist() == token_heads and planned.token_heads.dtype == torch.int64
    assert planned.query_start.tolist() == start and planned.query_start.dtype == torch.int32
    assert planned.max_query_len == max(row.num_tokens for _, row in compacted)
    assert planned.slots.tolist() == [row.slot for _, row in compacted] and planned.slots.dtype == torch.int32
    assert planned.seq_lens.tolist() == [row.length for _, row in compacted] and planned.seq_lens.dtype == torch.int32
    assert planned.block_table.tolist() == [row.blocks for _, row in compacted]
    assert planned.block_table.dtype == torch.int32


@MIXES
@pytest.mark.parametrize("num_kv_heads", [1, 2, 5])
def test_each_sequence_has_the_pages_of_its_request(num_kv_heads: int, mix: str) -> None:
    """Sequence i * num_kv_heads + head is head `head` of request i, as in `query_start`."""
    batch = make_batch(num_kv_heads, SHAPES[mix])
    planned, compacted = batch.plan(), batch.compacted
    pages, lengths = page_rows(batch.tables, planned.slots, planned.seq_lens, planned.block_table)
    sequences = len(compacted) * num_kv_heads
    assert pages.shape[:2] == lengths.shape == (LAYERS, sequences)
    assert len(planned.query_start) == sequences + 1
    for i, (_, row) in enumerate(compacted):
        alone, slots = page_rows(
            batch.tables,
            torch.tensor([row.slot], dtype=torch.int32),
            torch.tensor([row.length], dtype=torch.int32),
            torch.tensor([row.blocks], dtype=torch.int32),
        )
        counts = batch.tables.counts[row.slot]
        for layer in range(LAYERS):
            for head in range(num_kv_heads):
                sequence = i * num_kv_heads + head
                assert lengths[layer, sequence] == slots[layer, head]
                assert slots[layer, head] == counts[layer, head] * PAGE + row.length - 6 * PAGE
                own = alone[layer, head, : -(-int(slots[layer, head]) // PAGE)].tolist()
                assert own and 0 not in own
                assert pages[layer, sequence].tolist() == own + [0] * (pages.shape[-1] - len(own))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (4, 4), (8, 2)])
def test_gathered_queries_are_each_heads_own(num_heads: int, num_kv_heads: int) -> None:
    """[tokens, heads, d] seen as [tokens * KV heads, group, d]: what the attention kernel is given, and back."""
    batch, group = make_batch(num_kv_heads, SHAPES["mixed"]), num_heads // num_kv_heads
    tokens = batch.starts[-1]
    queries = torch.randn(tokens, num_heads, 8)
    planned = batch.plan()
    assert planned.token_heads is not None
    gathered = queries.view(-1, group, 8)[planned.token_heads]
    for i, (start, row) in enumerate(batch.compacted):
        for head in range(num_kv_heads):
            first, last = planned.query_start[i * num_kv_heads + head : i * num_kv_heads + head + 2].tolist()
            own = queries[start : start + row.num_tokens, head * group : (head + 1) * group]
            assert torch.equal(gathered[first:last], own)

    output = torch.zeros_like(queries)
    output.view(-1, group, 8)[planned.token_heads] = gathered
    seen = torch.zeros(tokens, dtype=torch.bool)
    for start, row in batch.compacted:
        seen[start : start + row.num_tokens] = True
    assert torch.equal(output[seen], queries[seen]) and not output[~seen].any()
    assert seen.any() and not seen.all()
