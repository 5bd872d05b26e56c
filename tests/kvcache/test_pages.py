"""Page numbers and page layouts, against plain lists."""

from __future__ import annotations

import pytest
import torch

from kvcache.pages import InterleavedCodec, PageCodec, PageGeometry, PermutedCodec
from tests.kvcache.plain_tables import BLOCK_MAJOR, BLOCKS, HEADS, LAYER_MAJOR, LAYERS, PAGE, grid, page_of
from tests.kvcache.synthetic import bits

DIM = 8
GEOMETRIES = pytest.mark.parametrize("geometry", [BLOCK_MAJOR, LAYER_MAJOR], ids=["block-major", "layer-major"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
PERMUTED = PermutedCodec(torch.randperm(2 * PAGE * DIM, generator=torch.Generator().manual_seed(1)), PAGE, DIM)
CODECS = pytest.mark.parametrize("codec", [PERMUTED, InterleavedCodec(PAGE, DIM)], ids=["permuted", "interleaved"])


def place(codec: PageCodec, part: int, token: int, i: int) -> int:
    """Where in a page number `i` of a token's key (part 0) or value (part 1) lies."""
    if isinstance(codec, PermutedCodec):
        return int(codec.order[(part * PAGE + token) * DIM + i])
    return (token * 2 + part) * DIM + i


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


@CODECS
@DTYPES
def test_codec_puts_every_element_in_its_place_and_back(codec: PageCodec, dtype: torch.dtype) -> None:
    keys, values = torch.randn(3, 2, PAGE, DIM).to(dtype), torch.randn(3, 2, PAGE, DIM).to(dtype)
    pages = codec.pack(keys, values)
    assert pages.shape == (3, 2, 2 * PAGE * DIM) and pages.dtype == dtype
    for token in range(PAGE):
        for i in range(DIM):
            assert torch.equal(pages[..., place(codec, 0, token, i)], keys[..., token, i])
            assert torch.equal(pages[..., place(codec, 1, token, i)], values[..., token, i])
    unpacked = codec.unpack(pages)
    assert torch.equal(unpacked[0], keys) and torch.equal(unpacked[1], values)
    nan = torch.full((1, 2 * PAGE * DIM), float("nan"))
    assert torch.equal(bits(codec.pack(*codec.unpack(nan))), bits(nan))


def test_plain_codec_is_keys_then_values() -> None:
    keys, values = PermutedCodec.plain(PAGE, DIM).unpack(torch.arange(2.0 * PAGE * DIM))
    assert torch.cat([keys.flatten(), values.flatten()]).tolist() == list(range(2 * PAGE * DIM))
    assert keys[1, 0] == DIM and values[0, 0] == PAGE * DIM


@CODECS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("num_tokens", [0, 1, 30])
def test_copied_tokens_keep_their_bits(codec: PageCodec, dtype: torch.dtype, num_tokens: int) -> None:
    """Any bits, NaNs of all kinds among them; sources repeat, and come from and go to any place in a page."""
    num_pages, generator = 20, torch.Generator().manual_seed(num_tokens)
    size = 2 * PAGE * DIM * dtype.itemsize
    content = torch.randint(0, 256, (num_pages, size), dtype=torch.uint8, generator=generator)
    content[3] = 0xFF  # NaN in every one of these types, as negative as can be
    pages = content.clone().view(dtype)
    if dtype.is_floating_point:
        assert pages.float().isnan().any()
    slots = torch.randperm(num_pages * PAGE, generator=generator)
    source = torch.cat([slots[40:], torch.arange(3 * PAGE, 4 * PAGE)])
    source = source[torch.randint(0, len(source), (num_tokens,), generator=generator)]
    target = slots[~torch.isin(slots, source)][:num_tokens]
    codec.copy_tokens(pages, source, target)

    expected = content.view(num_pages, 2 * PAGE * DIM, dtype.itemsize).tolist()
    before = content.view(num_pages, 2 * PAGE * DIM, dtype.itemsize).tolist()
    for one, other in zip(source.tolist(), target.tolist(), strict=True):
        for part in range(2):
            for i in range(DIM):
                to, origin = place(codec, part, other % PAGE, i), place(codec, part, one % PAGE, i)
                expected[other // PAGE][to] = before[one // PAGE][origin]
    assert pages.view(torch.uint8).view(num_pages, 2 * PAGE * DIM, dtype.itemsize).tolist() == expected
