"""Page numbers, page layouts and page tables, against plain lists."""

from __future__ import annotations

import pytest
import torch

from kvcache.pages import PageGeometry, PageTable, PermutedCodec
from tests.kvcache.synthetic import bits

LAYERS, HEADS, BLOCKS, PAGE = 3, 2, 50, 4
BLOCK_MAJOR = PageGeometry(tuple(HEADS * layer for layer in range(LAYERS)), HEADS * LAYERS, HEADS, PAGE, 8)
LAYER_MAJOR = PageGeometry(tuple(HEADS * BLOCKS * layer + 5 for layer in range(LAYERS)), HEADS, HEADS, PAGE, 8)
GEOMETRIES = pytest.mark.parametrize("geometry", [BLOCK_MAJOR, LAYER_MAJOR], ids=["block-major", "layer-major"])
COUNTS = torch.tensor([[5, 5], [1, 3], [2, 0]])


def page_of(geometry: PageGeometry, layer: int, block: int, head: int) -> int:
    if geometry is BLOCK_MAJOR:
        return (block * LAYERS + layer) * HEADS + head
    return 5 + (layer * BLOCKS + block) * HEADS + head


def grid() -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]


@GEOMETRIES
def test_page_numbers(geometry: PageGeometry) -> None:
    blocks = torch.tensor([7, 0, 49])
    for layer in range(LAYERS):
        expected = [[page_of(geometry, layer, block, head) for block in (7, 0, 49)] for head in range(HEADS)]
        assert geometry.pages_of(layer, blocks).tolist() == expected
    pool = [page_of(geometry, layer, block, head) for layer, head in grid() for block in (7, 0, 49)]
    assert geometry.pool_of(blocks).tolist() == pool
    assert geometry.pages_of(0, blocks[:0]).shape == (HEADS, 0)
    everything = geometry.pool_of(torch.arange(BLOCKS))
    assert len(everything.unique()) == LAYERS * HEADS * BLOCKS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codec_puts_every_element_in_its_place_and_back(dtype: torch.dtype) -> None:
    order = torch.randperm(2 * PAGE * 8)
    codec = PermutedCodec(order, PAGE, 8)
    keys, values = torch.randn(3, 2, PAGE, 8).to(dtype), torch.randn(3, 2, PAGE, 8).to(dtype)
    pages = codec.pack(keys, values)
    assert pages.shape == (3, 2, 2 * PAGE * 8) and pages.dtype == dtype
    for token in range(PAGE):
        for i in range(8):
            assert torch.equal(pages[..., order[token * 8 + i]], keys[..., token, i])
            assert torch.equal(pages[..., order[(PAGE + token) * 8 + i]], values[..., token, i])
    unpacked = codec.unpack(pages)
    assert torch.equal(unpacked[0], keys) and torch.equal(unpacked[1], values)
    nan = torch.full((1, 2 * PAGE * 8), float("nan"))
    assert torch.equal(bits(codec.pack(*codec.unpack(nan))), bits(nan))


def test_plain_codec_is_keys_then_values() -> None:
    keys, values = PermutedCodec.plain(PAGE, 8).unpack(torch.arange(2.0 * PAGE * 8))
    assert torch.cat([keys.flatten(), values.flatten()]).tolist() == list(range(2 * PAGE * 8))
    assert keys[1, 0] == 8 and values[0, 0] == PAGE * 8


@GEOMETRIES
def test_table_grows_with_appended_blocks(geometry: PageGeometry) -> None:
    """From nothing appended to forty blocks, in uneven steps, with repeats: each row against a list."""
    pool = torch.randperm(200)[: int(COUNTS.sum())] + 300
    table = PageTable(geometry, COUNTS, pool, first_block=6)
    remaining = pool.tolist()
    expected: dict[tuple[int, int], list[int]] = {}
    for layer, head in grid():
        count = int(COUNTS[layer, head])
        expected[layer, head], remaining = remaining[:count], remaining[count:]
    compacted = {place: list(pages) for place, pages in expected.items()}
    blocks = torch.randperm(BLOCKS, dtype=torch.int32)
    done = 0
    for length in (0, 1, 1, 2, 3, 7, 8, 9, 10, 11, 30, 30, 31, 40):
        table.append(blocks[:length])
        for layer, head in grid():
            expected[layer, head] += [page_of(geometry, layer, b, head) for b in blocks[done:length].tolist()]
        done = length
        rows = table.rows()
        assert rows.shape == (LAYERS, HEADS, int(COUNTS.max()) + length) and rows.dtype == torch.int32
        for layer, head in grid():
            pages = expected[layer, head]
            assert rows[layer, head].tolist() == pages + [0] * (rows.shape[-1] - len(pages))
            assert table.compacted(layer).split(table.counts[layer].tolist())[head].tolist() == compacted[layer, head]
    assert table.num_appended == 40


@pytest.mark.parametrize("pages", [0, 15, 17])
def test_pool_of_another_size_is_an_error(pages: int) -> None:
    with pytest.raises(ValueError, match=f"16 pages wanted, the pool has {pages}"):
        PageTable(BLOCK_MAJOR, COUNTS, torch.arange(pages), first_block=0)


def test_physical_lengths() -> None:
    """A prompt of 26 tokens: 6 full pages and a tail of 2; then one token after another."""
    table = PageTable(BLOCK_MAJOR, COUNTS, torch.arange(16), first_block=6)
    assert table.physical_lengths(26).dtype == torch.int32
    for length in range(26, 60):
        slots = [[int(count) * PAGE + length - 24 for count in row] for row in COUNTS]
        assert table.physical_lengths(length).tolist() == slots
    table.append(torch.arange(9))
    assert table.physical_lengths(60)[0, 0] == 5 * PAGE + 9 * PAGE, "every appended slot is in use"
