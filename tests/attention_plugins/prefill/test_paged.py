"""Keys and values read from pages are those that were written there."""

from __future__ import annotations

import pytest
import torch

from attention_plugins.prefill.paged import PagedTokens
from kvcache.pages import InterleavedCodec, PageCodec, PermutedCodec

HEADS, PAGE, DIM, LENGTH = 2, 4, 8, 19


@pytest.mark.parametrize("kind", ["interleaved", "permuted"])
@pytest.mark.parametrize("values", [False, True])
def test_ranges_and_single_tokens(kind: str, values: bool) -> None:
    codec: PageCodec = InterleavedCodec(PAGE, DIM) if kind == "interleaved" else PermutedCodec.plain(PAGE, DIM)
    plain = torch.randn(2, HEADS, LENGTH, DIM)
    blocks = -(-LENGTH // PAGE)
    table = torch.randperm(HEADS * blocks + 3)[: HEADS * blocks].view(HEADS, blocks)
    padded = torch.nn.functional.pad(plain, (0, 0, 0, blocks * PAGE - LENGTH)).unflatten(2, (blocks, PAGE))
    pages = torch.full((HEADS * blocks + 3, 2 * PAGE * DIM), float("nan"))
    pages[table] = codec.pack(padded[0], padded[1])
    reader = PagedTokens(pages, table, codec, PAGE, DIM, LENGTH, values, torch.float32)
    wanted = plain[int(values)]
    assert reader.shape == wanted.shape
    for first, last in ((0, LENGTH), (3, 5), (4, 8), (7, 18), (18, 19)):
        assert torch.equal(reader.read(first, last), wanted[:, first:last])
    positions = torch.randint(LENGTH, (HEADS, 3, 5))
    heads = torch.arange(HEADS)[:, None, None]
    assert torch.equal(reader.gather(positions), wanted[heads, positions])


def test_quantised_numbers_are_multiplied() -> None:
    pages = torch.arange(16.0).view(1, 16)
    reader = PagedTokens(
        pages, torch.zeros(1, 1, dtype=torch.int64), InterleavedCodec(2, 4), 2, 4, 2, True, torch.bfloat16, scale=0.5
    )
    assert reader.read(0, 2).dtype == torch.bfloat16
    assert reader.read(0, 2).tolist() == [[[2.0, 2.5, 3.0, 3.5], [6.0, 6.5, 7.0, 7.5]]]
