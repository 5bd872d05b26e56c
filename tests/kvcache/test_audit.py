"""An audit of page tables finds each thing that can be wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kvcache.audit import AuditError, Owned, audit_rows, audit_tables
from kvcache.compressor import Compressor
from kvcache.orders import Compact, Start
from kvcache.pages import InterleavedCodec, PageGeometry
from kvcache.plan import RetentionPlan
from kvcache.tables import PageTables

LAYERS, HEADS, PAGE = 2, 2, 4
PLAN = RetentionPlan(22, PAGE, 3)
OWNED = {
    "a": Owned([0, 0, 0, 0, 0, 6, 7], [20, 21, 22], 22, 12),
    "b": Owned([0, 0, 0, 0, 0, 16], [30, 31, 32], 22, 12),
    "c": Owned([40, 41], []),
}


@pytest.fixture
def compressor() -> Compressor:
    """Two requests that were compacted."""
    geometry = PageGeometry((0, HEADS), LAYERS * HEADS, HEADS, PAGE, 4)
    tables = PageTables(geometry, slots=4, width=8)
    found = Compressor(geometry, InterleavedCodec(PAGE, 4), torch.rand(50 * 4, 2 * PAGE * 4), tables, scale=1.0)
    for name, first, targets in (("a", 1, [20, 21, 22]), ("b", 11, [30, 31, 32])):
        found.start(Start(name, {"policy": "random", "budget": 14, "recent": 2}, PLAN))
        found.compact(Compact(name, [*range(first, first + 6)], targets, 22))
    return found


def test_tables_that_are_whole_pass(compressor: Compressor) -> None:
    audit_tables(compressor, OWNED)
    audit_tables(compressor, {})


def _tables(change: Callable[[PageTables, int], object]) -> Callable[[Compressor], object]:
    return lambda compressor: change(compressor.tables, compressor.slot("b") or 0)


FAULTS: dict[str, tuple[Callable[[Compressor], object], str]] = {
    "a slot is free and used": (_tables(lambda tables, slot: tables.release(slot)), "aren't each of 4 once"),
    "a block has two owners": (
        _tables(lambda tables, slot: tables.blocks[slot, 0].fill_(21)), "block 21 is in the page tables of b and of a"),
    "a page is handed out twice": (
        _tables(lambda tables, slot: tables.starts[slot, 1, 0].sub_(1)), "b: its 12 pages aren't handed out once each"),
    "a page is left over": (
        _tables(lambda tables, slot: tables.counts[slot, 1, 1].sub_(1)), "b: its 12 pages aren't handed out once each"),
    "a block isn't its own": (
        _tables(lambda tables, slot: tables.blocks[slot, 1].fill_(33)), r"b: .* \[30, 33, 32\], it owns \[30, 31"),
    "it goes on elsewhere": (_tables(lambda tables, slot: tables.advance(slot, 6)), "b: .* goes on with block 6"),
    "it is gone": (lambda compressor: compressor.finish("b"), "b was compacted at 22, and has no page table"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_tables_that_are_not_are_told(compressor: Compressor, fault: str) -> None:
    change, message = FAULTS[fault]
    change(compressor)
    with pytest.raises(AuditError, match=message):
        audit_tables(compressor, OWNED)


@pytest.mark.parametrize("change, message", [
    ({"kept_tokens": 16}, "b: 12 compacted tokens per head, 16 are planned"),
    ({"blocks": [0] * 6}, "b: a block behind 22 was released"),
])  # fmt: skip
def test_owners_that_lack_something_are_told(compressor: Compressor, change: dict[str, object], message: str) -> None:
    with pytest.raises(AuditError, match=message):
        audit_tables(compressor, {**OWNED, "b": replace(OWNED["b"], **change)})  # type: ignore[arg-type]


def test_rows_of_a_batch_are_what_is_owned() -> None:
    """Where blocks were released, a worker may have any number."""
    table = torch.tensor([[40, 41, 9, 9, 9, 9, 9], [1, 2, 3, 4, 5, 6, 7]], dtype=torch.int32)
    audit_rows(["c", "a"], table, OWNED)
    audit_rows(["x", "a"], table, OWNED)
    table[1, 6] = 8
    with pytest.raises(AuditError, match=r"a: its blocks \[6\] are .* in the batch"):
        audit_rows(["c", "a"], table, OWNED)
