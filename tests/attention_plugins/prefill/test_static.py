"""Patterns that look at nothing: which blocks they see."""

from __future__ import annotations

import pytest
import torch

from attention_plugins.prefill.attention import dense_attention
from attention_plugins.prefill.base import Chunk
from tests.attention_plugins.prefill.prompts import DIM, make, make_prompt


def blocks(name: str, block: int, count: int, heads: int = 1, **words: int) -> torch.Tensor:
    """Blocks of keys that blocks of queries see: bool [heads, count, count], from a prompt of `count` blocks."""
    length = block * count
    chunk = Chunk(torch.zeros(length, heads, 1), torch.zeros(heads, length, 1), scale=1.0)
    mask = make(name, **words).plan(chunk).mask
    rows = mask[:, (torch.arange(count) * block) // 128]
    return rows.unflatten(-1, (count, -1)).any(-1)


def seen(mask: torch.Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def test_power_golden() -> None:
    mask = blocks("power", 256, 17, window=1)[0]
    assert seen(mask[16]) == [0, 8, 12, 14, 15, 16]
    assert seen(blocks("power", 256, 17, window=4)[0, 16]) == [0, 8, 12, 13, 14, 15, 16]


def test_power_sees_all_of_the_sink() -> None:
    """A block of 256, of which every pattern sees half."""
    chunk = make_prompt(14 * 256).chunk()
    assert make("power", window=1).plan(chunk).mask[0, 27].unflatten(0, (14, 16))[:2].all(-1).tolist() == [True, False]


def test_power_reaches_the_first_block_in_few_hops() -> None:
    """Without the sink, by powers of two alone."""
    mask = blocks("power", 256, 33, window=1)[0]
    hops = [0] + [0] * 32
    for block in range(1, 33):
        powers = [key for key in seen(mask[block]) if block - key > 0 and (block - key).bit_count() == 1]
        hops[block] = 1 + min(hops[key] for key in powers)
        assert hops[block] <= block.bit_length()


def test_strided_golden() -> None:
    """Block 0, the row's own and its neighbour in the block of 128 rows apart, heads shard the others."""
    mask = blocks("strided", 64, 18, heads=4, local=1, stride=4)
    shards = [[key for key in seen(head[16]) if 1 < key < 16] for head in mask]
    assert shards == [[4, 8, 12], [3, 7, 11, 15], [2, 6, 10, 14], [5, 9, 13]]
    assert seen(mask.any(0)[16]) == list(range(18))


def test_strided_columns_only_switch_off() -> None:
    """Behind the diagonal, a block that a head doesn't read is never read again."""
    mask = blocks("strided", 64, 40, heads=4, local=6, stride=8)
    for head in mask:
        for key in range(40):
            below = head[key + key % 2 :: 2, key].tolist()
            assert below == sorted(below, reverse=True)


def test_strided_dense_heads() -> None:
    chunk = make_prompt().chunk()
    density = make("strided", local=1, stride=4, dense_heads=1).plan(chunk).density()
    assert density[0] < 1 and density[1] == 1


def test_bigbird_draws() -> None:
    """Every row sees at most its share, draws differ by head and row and seed, and never by chunk."""
    mask = blocks("bigbird", 128, 30, heads=8, globals=1, window=1, random=2)
    assert mask.sum(-1).amax() <= 2 + 2 * 2 + 1
    extra = mask.clone()
    for row in range(30):
        extra[:, row, [0, row]] = False
    assert len({tuple(seen(head[29])) for head in extra}) > 5
    drawn = extra.sum(1).sum(0)
    assert (drawn[1:20] > 0).all(), "draws are spread over the keys"
    other = blocks("bigbird", 128, 30, heads=8, globals=1, window=1, random=2, seed=1)
    assert not torch.equal(mask, other)


def test_bigbird_layers_differ() -> None:
    prompt = make_prompt(2000)
    plans = [make("bigbird", random=2).plan(prompt.chunk(layer=layer)).mask for layer in (0, 1)]
    assert not torch.equal(*plans)


@pytest.mark.parametrize("block", [16, 17])
def test_streaming_loses_what_lies_between(block: int) -> None:
    """The reference of what a pattern does wrong: a row's attention to the middle is gone."""
    prompt = make_prompt(2400)
    chunk = prompt.chunk()
    plan = make("streaming", sinks=128, window=256).plan(chunk)
    first = block * 128
    assert seen(plan.mask[0, block]) == [*range(8), *range((first - 255) // 16, (first + 128) // 16)]
    assert plan.mask.shape[0] == 2 and dense_attention(chunk, prompt.values)[0].shape == (2400, 4, DIM)
