"""Kept positions in few numbers, against the positions themselves."""

from __future__ import annotations

import pytest
import torch

from kvcache.kept_positions import MOST_BINS, KeptPositions, bin_width, wanted
from kvcache.method import PolicyError
from tests import device


@pytest.mark.parametrize(("seen", "width"), [(1, 1), (256, 1), (257, 2), (512, 2), (6000, 24), (131072, 512)])
def test_few_bins_hold_every_token(seen: int, width: int) -> None:
    assert bin_width(seen) == width
    assert -(-seen // width) <= MOST_BINS


@pytest.mark.parametrize("width", [1, 3, 7])
def test_each_kept_token_is_counted_once_in_its_bin(width: int) -> None:
    kept = [[[0, 1, 6, 20], [3, 21]], [[5], [0, 2, 4, 6, 8]]]  # by layer and head, below position 22
    lengths = torch.tensor([[len(head) for head in layer] for layer in kept])
    most = int(lengths.max())
    padded = torch.tensor([[head + [999] * (most - len(head)) for head in layer] for layer in kept])
    counted = KeptPositions.count(padded.to(device.DEVICE), lengths.to(device.DEVICE), width)
    if device.DEVICE.type == "cuda":
        torch.cuda.synchronize()
    told = counted.usage(whole_from=22, seen=25)
    assert (told["tokens"], told["bin_tokens"], told["kv_heads"]) == (25, width, 2)
    assert len(told["by_layer"]) == 2
    for layer, row in zip(kept, told["by_layer"], strict=True):
        expected = [0] * -(-25 // width)
        for head in layer:
            for position in [*head, 22, 23, 24]:
                expected[position // width] += 1
        assert row == expected


def test_what_may_be_asked_for() -> None:
    assert wanted({"policy": "snapkv", "report": "positions"})
    assert not wanted({"policy": "snapkv"})
    with pytest.raises(PolicyError, match=r"kv_cache\.report: there is no such report: 'all'\. Allowed: 'positions'"):
        wanted({"report": "all"})
