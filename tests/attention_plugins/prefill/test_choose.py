"""Choosing by score: the dossier's numbers, ties, shares."""

from __future__ import annotations

import pytest
import torch

from attention_plugins.prefill.choose import count_to_reach, cover, ranks, top
from tests.device import DEVICE


def test_ties_go_to_the_lower_position() -> None:
    scores = torch.tensor([[1.0, 3.0, 1.0, 3.0, 2.0]])
    assert ranks(scores).tolist() == [[3, 0, 4, 1, 2]]
    assert top(scores, 4).tolist() == [[True, True, False, True, True]]
    assert top(scores.expand(2, 5), torch.tensor([[0], [1]])).sum(-1).tolist() == [0, 1]


def test_nan_is_kept() -> None:
    scores = torch.tensor([[1.0, float("nan"), 3.0], [1.0, 2.0, 3.0]])
    assert top(scores, 1)[:, 1].tolist() == [True, False]
    assert cover(scores, 0.4).tolist() == [[True] * 3, [False, False, True]]


@pytest.mark.parametrize(("share", "count"), [(0.8, 3), (0.9, 4), (0.95, 5), (1.0, 5)])
def test_flexprefills_counts(share: float, count: int) -> None:
    """The paper's code goes one past the end at 1: 6."""
    for order in ([0.5, 0.2, 0.15, 0.1, 0.05], [0.05, 0.2, 0.1, 0.5, 0.15]):
        assert count_to_reach(torch.tensor(order), share).tolist() == [count]


@pytest.mark.parametrize(("share", "blocks"), [(0.5, [0, 1, 5]), (0.9, [0, 1, 3, 4, 5]), (1.0, [0, 1, 2, 3, 4, 5])])
def test_xattentions_blocks(share: float, blocks: list[int]) -> None:
    first = torch.tensor([True, False, False, False, False, True])
    chosen = cover(torch.tensor([0.05, 0.4, 0.05, 0.3, 0.1, 0.1]), share, first)
    assert chosen.nonzero().flatten().tolist() == blocks


def test_equal_masses_give_the_share() -> None:
    assert cover(torch.full((3, 20), 0.05), 0.25).sum(-1).tolist() == [5, 5, 5]
    assert cover(torch.zeros(3), 0.5, torch.tensor([True, False, False])).tolist() == [True, False, False]


@pytest.mark.parametrize("seed", range(5))
def test_cover_reaches_its_share_with_the_fewest(seed: int) -> None:
    mass = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed), device="cpu").to(DEVICE).mul(3).softmax(-1)
    chosen = cover(mass, 0.8)
    kept = mass.masked_fill(~chosen, 0)
    assert (kept.sum(-1) >= 0.8 - 1e-5).all()
    smallest = kept.masked_fill(~chosen, 1).amin(-1)
    assert (kept.sum(-1) - smallest < 0.8).all() and (mass.masked_fill(chosen, 0).amax(-1) <= smallest).all()
