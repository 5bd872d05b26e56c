"""The rows of one layer by a kernel, against the naive twin."""

from __future__ import annotations

import pytest
import torch

from attention_plugins.page_rows import page_rows
from kvcache.pages import PageGeometry
from kvcache.tables import PageTables

pytest.importorskip("triton")

LAYERS, PAGE, UNTOUCHED = 3, 4, -7


def geometry(num_kv_heads: int, block_major: bool) -> PageGeometry:
    if block_major:
        return PageGeometry(tuple(layer * num_kv_heads for layer in range(LAYERS)), LAYERS * num_kv_heads,
                            num_kv_heads, PAGE, 8)  # fmt: skip
    return PageGeometry(tuple(5 + layer * 5000 for layer in range(LAYERS)), num_kv_heads, num_kv_heads, PAGE, 8)


def take(tables: PageTables, num_blocks: int, first_block: int, seed: int) -> int:
    """A request whose pages are shared over layers and heads at random: some may have none."""
    generator = torch.Generator().manual_seed(seed)
    g = tables.geometry
    owners = torch.randint(0, g.num_layers * g.num_kv_heads, (num_blocks * g.num_layers * g.num_kv_heads,),
                           generator=generator)  # fmt: skip
    counts = torch.bincount(owners, minlength=g.num_layers * g.num_kv_heads).view(g.num_layers, g.num_kv_heads)
    blocks = torch.randperm(1000, generator=generator)[:num_blocks]
    return tables.take(counts, blocks.to(tables.blocks.device), first_block)


def assert_like_twin(tables: PageTables, slots: list[int], lengths: list[int], blocks: int) -> int:
    """All layers' rows into one pair of tensors that is larger than needed; returns the most pages of a row."""
    from attention_plugins.kernels.page_rows import page_rows_into

    device, heads = tables.blocks.device, tables.geometry.num_kv_heads
    ids = torch.tensor(slots, dtype=torch.int32, device=device)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(blocks)
    wide = torch.randint(0, 1000, (len(slots), blocks + 9), dtype=torch.int32, generator=generator)
    block_table = wide.to(device)[:, :blocks]  # a part of a wider table, as vLLM gives
    expected, expected_lengths = page_rows(tables, ids, seq_lens, block_table)
    width = expected.shape[-1]
    for layer in range(LAYERS):
        buffer = torch.full((len(slots) * heads + 2, width + 3), UNTOUCHED, dtype=torch.int32, device=device)
        in_use = torch.full((len(slots) * heads + 2,), UNTOUCHED, dtype=torch.int32, device=device)
        page_rows_into(buffer[:-2, :-1], in_use[:-2], tables, layer, ids, seq_lens, block_table)
        assert in_use.tolist() == expected_lengths[layer].tolist() + [UNTOUCHED] * 2
        for row, length in enumerate(expected_lengths[layer].tolist()):
            pages = -(-length // PAGE)
            assert buffer[row, :pages].tolist() == expected[layer, row, :pages].tolist()
            assert (buffer[row, pages:] == UNTOUCHED).all()
        assert (buffer[-2:] == UNTOUCHED).all()
    return width


LAYOUTS = pytest.mark.parametrize("block_major", [True, False], ids=["block-major", "layer-major"])


@LAYOUTS
@pytest.mark.parametrize("num_kv_heads", [1, 2, 5])
def test_rows_of_a_batch(num_kv_heads: int, block_major: bool, device: torch.device) -> None:
    """Slots in any order, unused rows between them, first blocks and counts that differ."""
    tables = PageTables(geometry(num_kv_heads, block_major), slots=5, width=9, device=device)
    slots = [take(tables, num_blocks, 2 + seed, seed) for seed, num_blocks in enumerate([1, 9, 4, 2])]
    slots = [-1, slots[2], slots[0], -1, slots[3], slots[1], -1]
    assert_like_twin(tables, slots, [17, 30, 41, 0, 27, 79, 10**6], blocks=20)


@LAYOUTS
def test_tail_page_by_page(block_major: bool, device: torch.device) -> None:
    """An empty tail (the length is whole pages), and then every length up to the next such."""
    tables = PageTables(geometry(2, block_major), slots=1, width=3, device=device)
    slot = take(tables, 3, 6, seed=1)
    for length in (*range(6 * PAGE, 8 * PAGE + 2), 12 * PAGE):
        assert_like_twin(tables, [slot], [length], blocks=12)


@LAYOUTS
@pytest.mark.parametrize(
    ("num_blocks", "appended"), [(300, 0), (255, 1), (256, 257), (3, 700), (600, 300)], ids=lambda value: str(value)
)
def test_rows_longer_than_a_step_of_256_columns(
    num_blocks: int, appended: int, block_major: bool, device: torch.device
) -> None:
    tables = PageTables(geometry(2, block_major), slots=2, width=600, device=device)
    slots = [take(tables, num_blocks, 6, seed=3), take(tables, 2, 1, seed=4)]
    lengths = [(6 + appended) * PAGE - appended % PAGE, 9 * PAGE]
    assert assert_like_twin(tables, slots, lengths, blocks=6 + appended + 9) > 256


@pytest.mark.parametrize("count", [256, 512])
def test_compacted_pages_that_fill_a_step(count: int, device: torch.device) -> None:
    """The first appended page is the next step's first column."""
    tables = PageTables(geometry(2, True), slots=1, width=count, device=device)
    counts = torch.full((LAYERS, 2), count)
    slot = tables.take(counts, torch.randperm(1000, device=device)[:count], 3)
    for appended in (0, 1, 256, 257):
        assert assert_like_twin(tables, [slot], [(3 + appended) * PAGE], blocks=400) == count + appended


def test_layers_and_heads_with_and_without_pages(device: torch.device) -> None:
    """One head has all of a layer's pages, one layer none at all."""
    tables = PageTables(geometry(2, True), slots=1, width=4, device=device)
    slot = tables.take(torch.tensor([[11, 0], [0, 0], [1, 12]]), torch.tensor([7, 0, 49, 3], device=device), 2)
    for length in (8, 9, 30):
        assert_like_twin(tables, [slot], [length], blocks=10)


@LAYOUTS
def test_leftovers_of_an_earlier_request(block_major: bool, device: torch.device) -> None:
    tables = PageTables(geometry(2, block_major), slots=1, width=9, device=device)
    for seed, num_blocks in enumerate([9, 1, 5, 2]):
        slot = take(tables, num_blocks, seed, seed)
        assert_like_twin(tables, [slot, -1], [29 + seed, 8], blocks=10)
        tables.release(slot)


def test_a_batch_without_compacted_rows(device: torch.device) -> None:
    """As at the capture of a CUDA graph: nobody has taken a slot yet, and lengths are anything."""
    tables = PageTables(geometry(2, True), slots=2, width=9, device=device)
    assert assert_like_twin(tables, [-1, -1, -1], [0, 1, 5000], blocks=10) == 0
