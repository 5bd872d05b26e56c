"""XAttention's estimate, in loops."""

from __future__ import annotations

import pytest
import torch

from attention_plugins.prefill import antidiagonals
from attention_plugins.prefill.antidiagonals import antidiagonal_masses
from tests.attention_plugins.prefill.prompts import DIM, NUM_HEADS, Prompt, make, make_prompt


def brute(prompt: Prompt, first: int, head: int, stride: int) -> torch.Tensor:
    """Estimated masses, one tile at a time: [q_blocks, k_blocks]."""
    length = len(prompt)
    found = torch.zeros(-(-(length - first) // 128), -(-length // 128))
    for row in range(first, length, stride):
        means = []
        for key in range(0, row + stride, stride):
            places = [(row + stride - 1 - t, key + t) for t in range(stride)]
            real = [(i, j) for i, j in places if i < length and j < length]
            logits = [float(prompt.queries[i, head] @ prompt.keys[head // 2, j]) for i, j in real]
            if key < length:
                means.append(sum(logits) / max(1, len(real)) * DIM**-0.5)
        weight = min(stride, length - row) / stride
        for tile, share in enumerate(torch.tensor(means).softmax(0)):
            found[(row - first) // 128, tile * stride // 128] += share * weight
    return found


@pytest.mark.parametrize(("first", "length"), [(0, 256), (128, 384), (256, 261), (60, 203), (131, 150)])
@pytest.mark.parametrize("stride", [8, 16, 32, 64, 128])
def test_masses(first: int, length: int, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(antidiagonals, "SLAB", 1)
    prompt = make_prompt(length)
    masses = antidiagonal_masses(prompt.chunk(first), stride)
    for head in (0, 3):
        torch.testing.assert_close(masses[head], brute(prompt, first, head, stride), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("threshold", [0.25, 0.5, 0.75])
def test_equal_keys_give_the_threshold(threshold: float) -> None:
    """All keys alike: masses are equal (the diagonal's half of them apart), and a share of the blocks is computed."""
    prompt = Prompt(torch.ones(2048, NUM_HEADS, DIM), torch.ones(2, 2048, DIM), torch.ones(2, 2048, DIM))
    blocks = make("xattention", threshold=threshold).plan(prompt.chunk()).mask[0, -1].unflatten(-1, (16, 8)).any(-1)
    assert abs(int(blocks.sum()) - threshold * 16) <= 1
    assert blocks[: int(blocks.sum()) - 1].all() and blocks[-1], "the lower position wins"


@pytest.mark.parametrize(("first", "length"), [(0, 1024), (512, 1024), (300, 1000)])
def test_largest_blocks_after_the_sink_and_the_rows_own(first: int, length: int) -> None:
    chunk = make_prompt(length).chunk(first)
    masses, mask = antidiagonal_masses(chunk, 8), make("xattention", threshold=0.6).plan(chunk).mask
    for head in range(NUM_HEADS):
        for block, start in enumerate(range(first, length, 128)):
            own = range(start // 128, min(start + 127, length - 1) // 128 + 1)
            shares = masses[head, block].tolist()
            wanted = {0, *own}
            for other in sorted(range(len(shares)), key=lambda key: -shares[key]):
                if sum(shares[key] for key in wanted) < 0.6 * sum(shares):
                    wanted.add(other)
            units = {unit for key in wanted for unit in range(key * 8, key * 8 + 8)}
            seen = {unit for unit in units if unit * 16 <= min(start + 127, length - 1)}
            assert set(mask[head, block].nonzero().flatten().tolist()) == seen
