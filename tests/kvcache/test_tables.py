"""Page tables and the rows that attention is given, against plain lists."""

from __future__ import annotations

import pytest
import torch

from attention_plugins.page_rows import page_rows
from kvcache.pages import PageGeometry
from kvcache.tables import PageTables
from tests.kvcache.plain_tables import BLOCK_MAJOR, BLOCKS, HEADS, LAYER_MAJOR, LAYERS, PAGE, PlainTable, grid

GEOMETRIES = pytest.mark.parametrize("geometry", [BLOCK_MAJOR, LAYER_MAJOR], ids=["block-major", "layer-major"])
COUNTS = [[6, 5], [1, 4], [2, 0]]
FIRST_BLOCK = 6
NO_BLOCK = 10**6


def take(tables: PageTables, table: PlainTable) -> int:
    return tables.take(torch.tensor(table.counts), torch.tensor(table.blocks), table.first_block)


def random_table(geometry: PageGeometry, num_blocks: int, seed: int) -> PlainTable:
    generator = torch.Generator().manual_seed(seed)
    owners = torch.randint(0, LAYERS * HEADS, (num_blocks * LAYERS * HEADS,), generator=generator)
    counts = torch.bincount(owners, minlength=LAYERS * HEADS).view(LAYERS, HEADS).tolist()
    return PlainTable(geometry, counts, torch.randperm(BLOCKS, generator=generator)[:num_blocks].tolist(), seed % 7)


def assert_rows(
    tables: PageTables, requests: list[tuple[int, PlainTable | None]], lengths: list[int], block_table: torch.Tensor
) -> None:
    """The rows of all requests (slot, table) at once, at these logical lengths."""
    slots = torch.tensor([slot for slot, _ in requests], dtype=torch.int32)
    rows, in_use = page_rows(tables, slots, torch.tensor(lengths, dtype=torch.int32), block_table)
    longest = 0
    for i, (_, table) in enumerate(requests):
        for layer, head in grid():
            at = (layer, i * HEADS + head)
            pages = table.pages(layer, head, lengths[i], block_table[i].tolist()) if table else []
            assert rows[at].tolist() == pages + [0] * (rows.shape[-1] - len(pages))
            assert in_use[at] == (table.slots_in_use(layer, head, lengths[i]) if table else 0)
            assert len(pages) == -(-int(in_use[at]) // PAGE)
            longest = max(longest, len(pages))
    assert rows.shape == (LAYERS, len(requests) * HEADS, longest) and rows.dtype == torch.int32
    assert in_use.shape == (LAYERS, len(requests) * HEADS) and in_use.dtype == torch.int32
    assert rows.is_contiguous() and in_use.is_contiguous()


@GEOMETRIES
def test_rows_grow_with_every_block(geometry: PageGeometry) -> None:
    """From an empty tail, token after token; block ids appear in vLLM's table when their first token does."""
    tables = PageTables(geometry, slots=3, width=5)
    table = PlainTable(geometry, COUNTS, [7, 0, 49], FIRST_BLOCK)
    slot = take(tables, table)
    block_table = torch.full((1, 20), NO_BLOCK, dtype=torch.int32)
    fresh = iter(torch.randperm(BLOCKS).tolist())
    for length in range(FIRST_BLOCK * PAGE, 20 * PAGE + 1):
        if length % PAGE == 1:
            block_table[0, length // PAGE] = next(fresh)
        assert_rows(tables, [(slot, table)], [length], block_table)
    assert int((block_table != NO_BLOCK).sum()) == 20 - FIRST_BLOCK


@GEOMETRIES
@pytest.mark.parametrize("length", [FIRST_BLOCK * PAGE, 26, 90, 184])
def test_width_of_the_block_table_does_not_matter(geometry: PageGeometry, length: int) -> None:
    """As narrow as the length allows, with other requests' blocks behind, and up to forty blocks appended."""
    tables = PageTables(geometry, slots=1, width=3)
    table = PlainTable(geometry, COUNTS, [3, 12, 4], FIRST_BLOCK)
    slot = take(tables, table)
    blocks = torch.randperm(BLOCKS, dtype=torch.int32)[None]
    for width in range(-(-length // PAGE), BLOCKS, 3):
        assert_rows(tables, [(slot, table)], [length], blocks[:, :width])


@GEOMETRIES
def test_rows_of_many_requests_with_others_between(geometry: PageGeometry) -> None:
    """Slots in any order, and rows of requests that aren't compacted: empty, whatever their lengths say."""
    tables = PageTables(geometry, slots=6, width=9)
    requests: list[tuple[int, PlainTable | None]] = []
    for seed, num_blocks in enumerate([1, 9, 4, 2]):
        table = random_table(geometry, num_blocks, seed)
        requests.append((take(tables, table), table))
    assert len({slot for slot, _ in requests}) == 4
    requests = [requests[2], (-1, None), requests[0], requests[3], (-1, None), requests[1], (-1, None)]
    lengths = [23, 0, 1, 50, 10**6, 77, 3]
    block_table = torch.stack([torch.randperm(BLOCKS, dtype=torch.int32) for _ in requests])
    assert_rows(tables, requests, lengths, block_table)
    assert_rows(tables, requests[:2], lengths[:2], block_table[:2])
    assert_rows(tables, requests[:3:2], lengths[:3:2], block_table[:3:2])
    assert_rows(tables, [(-1, None)] * 2, [5, 0], block_table[:2])
    assert_rows(tables, [], [], block_table[:0])


@GEOMETRIES
def test_slot_is_used_again_and_leftovers_mean_nothing(geometry: PageGeometry) -> None:
    tables = PageTables(geometry, slots=2, width=9)
    block_table = torch.stack([torch.randperm(BLOCKS, dtype=torch.int32) for _ in range(2)])
    stays = random_table(geometry, 3, seed=20)
    other = take(tables, stays)
    for seed, num_blocks in enumerate([9, 1, 5, 2, 9]):
        table = random_table(geometry, num_blocks, seed)
        slot = take(tables, table)
        assert {slot, other} == {0, 1}
        assert_rows(tables, [(other, stays), (slot, table)], [30, 31 + seed], block_table)
        tables.release(slot)


@GEOMETRIES
@pytest.mark.parametrize("num_blocks", [1, 3, 8])
def test_pool_is_ordered_by_layer_then_head_then_block(geometry: PageGeometry, num_blocks: int) -> None:
    tables = PageTables(geometry, slots=2, width=8)
    take(tables, random_table(geometry, 8, seed=1))
    table = random_table(geometry, num_blocks, seed=2)
    slot, size = take(tables, table), num_blocks * LAYERS * HEADS
    pool = tables.pool_pages(slot, torch.arange(size))
    assert pool.tolist() == table.pool() and pool.dtype == torch.int64
    assert torch.equal(pool, geometry.pool_of(torch.tensor(table.blocks)))
    assert sorted(set(pool.tolist())) == sorted(pool.tolist())
    index = torch.randint(0, size, (2, 3, 5))
    assert tables.pool_pages(slot, index).tolist() == torch.tensor(table.pool())[index].tolist()


@pytest.mark.parametrize("num_blocks", [0, 2, 4])
def test_pool_of_another_size_is_an_error(num_blocks: int) -> None:
    tables = PageTables(BLOCK_MAJOR, slots=1, width=4)
    pages = num_blocks * LAYERS * HEADS
    with pytest.raises(ValueError, match=f"18 pages wanted, the pool has {pages}"):
        tables.take(torch.tensor(COUNTS), torch.arange(num_blocks), first_block=0)
    tables.take(torch.tensor(COUNTS), torch.arange(3), first_block=0)  # the only slot is still free


def test_more_requests_than_slots_are_an_error() -> None:
    tables = PageTables(BLOCK_MAJOR, slots=2, width=3)
    table = PlainTable(BLOCK_MAJOR, COUNTS, [7, 0, 49], FIRST_BLOCK)
    slots = [take(tables, table), take(tables, table)]
    with pytest.raises(RuntimeError, match="all 2 page tables are in use"):
        take(tables, table)
    tables.release(slots[0])
    assert take(tables, table) == slots[0]


def test_slots_in_use() -> None:
    """A prompt of 26 tokens: 6 full pages and a tail of 2; then one token after another."""
    tables = PageTables(BLOCK_MAJOR, slots=1, width=3)
    slot = torch.tensor([tables.take(torch.tensor(COUNTS), torch.arange(3), first_block=6)], dtype=torch.int32)
    block_table = torch.arange(15, dtype=torch.int32)[None]
    for length in range(26, 60):
        expected = [[count * PAGE + length - 24 for count in row] for row in COUNTS]
        assert page_rows(tables, slot, torch.tensor([length], dtype=torch.int32), block_table)[1].tolist() == expected
    _, lengths = page_rows(tables, slot, torch.tensor([60], dtype=torch.int32), block_table)
    assert lengths[0, 0] == 6 * PAGE + 9 * PAGE, "every appended slot is in use"


@pytest.mark.parametrize(("slots", "width"), [(1, 1), (5, 40)])
def test_memory_is_what_it_says(slots: int, width: int) -> None:
    tables = PageTables(LAYER_MAJOR, slots=slots, width=width)
    tensors = (tables.blocks, tables.num_blocks, tables.first_block, tables.counts, tables.starts)
    assert all(tensor.dtype == torch.int32 for tensor in tensors)
    assert PageTables.nbytes(LAYERS, HEADS, slots, width) == sum(tensor.nbytes for tensor in tensors)


@GEOMETRIES
def test_a_table_never_moves(geometry: PageGeometry) -> None:
    """CUDA graphs read the tensors where they were at capture."""
    tables = PageTables(geometry, slots=1, width=9)
    before = {name: value.data_ptr() for name, value in vars(tables).items() if isinstance(value, torch.Tensor)}
    for seed in range(3):
        tables.release(take(tables, random_table(geometry, 9 - seed, seed)))
    assert {name: getattr(tables, name).data_ptr() for name in before} == before and len(before) == 6
