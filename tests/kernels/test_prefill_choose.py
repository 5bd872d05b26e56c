"""Choosing by score without sorting, and drawing what was chosen, against the plain twins."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from attention_plugins.kernels import prefill as kernels
from attention_plugins.prefill import plain
from attention_plugins.prefill.registry import make_pattern
from tests.kernels.prefill_chunk import Case

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 5, 100, 1000, 20000])
@pytest.mark.parametrize("count", [0, 1, 7, 600, 10**6])
def test_top(n: int, count: int, device: torch.device) -> None:
    scores = draw(3, n).to(device)
    scores[1] = scores[1].round()  # ties
    scores[2, ::3] = float("-inf")
    scores[0, n // 2] = float("nan")
    scores[1, 0] = float("inf")
    assert torch.equal(kernels.top(scores, count), plain.top(scores, count))


def test_top_of_each_its_own(device: torch.device) -> None:
    scores, counts = draw(2, 4, 300).to(device), torch.arange(8, device=device).view(2, 4, 1) * 40
    assert torch.equal(kernels.top(scores, counts), plain.top(scores, counts))
    assert torch.equal(kernels.top(scores, counts[:, :1]), plain.top(scores, counts[:, :1]))


@pytest.mark.parametrize("n", [1, 5, 100, 1000])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_cover(n: int, share: float, device: torch.device) -> None:
    mass = draw(3, 4, n).mul(3).softmax(-1).to(device)
    mass[0, 1] = 0
    mass[1] = 1 / n
    mass[2, 2, n // 2] = float("nan")
    own = draw(4, n, seed=1).to(device) > 1.5
    for first in (None, own, own[0]):
        assert torch.equal(kernels.cover(mass, share, first), plain.cover(mass, share, first))


def test_cover_of_masses_that_are_chosen_first(device: torch.device) -> None:
    with pytest.raises(ValueError, match="alike"):
        kernels.cover(torch.ones(2, 3, 4, device=device), 0.5, torch.ones(2, 3, 4, dtype=torch.bool, device=device))


@pytest.mark.parametrize("n", [1, 5, 100, 20000])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_count_to_reach(n: int, share: float, device: torch.device) -> None:
    mass = draw(2, 3, n).mul(3).softmax(-1).to(device)
    mass[0, 0] = 1 / n
    mass[0, 1, n // 2 :] = 0
    mass[1, 2, n // 2] = float("nan")
    found, expected = kernels.count_to_reach(mass, share), plain.count_to_reach(mass, share)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    # Equal shares are as many as rounding leaves; others are the same but where sums come close to the share.
    assert ((found - expected).abs() <= 1 + n // 1000).all()
    assert torch.equal(found[0, 1:], expected[0, 1:]) or n > 100


CASES = [Case(1, 1), Case(130, 130), Case(300, 999), Case(200, 1035, page=8), Case(517, 1100, page=32)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_plans_of_what_was_chosen(case: Case, share: float, device: torch.device) -> None:
    chunk, expected = case.make(device)
    grid = chunk.grid

    def flags(*shape: int, seed: int = 0) -> torch.Tensor:
        return draw(*shape, seed=seed).sigmoid().to(device) < share

    for block in (16, 64, 128):
        chosen = flags(4, grid.q_blocks, grid.k_blocks(block))
        found, wanted = (ops.block_plan(expected, chosen, block) for ops in (kernels, plain))
        assert torch.equal(found.mask, wanted.mask) and found.mask.dtype == torch.bool
    blocks = grid.k_blocks(128)
    stripes = flags(4, blocks), flags(4, blocks, seed=1), flags(4, grid.q_blocks, blocks, seed=2)
    assert torch.equal(*(ops.block_stripes(expected, *stripes).mask for ops in (kernels, plain)))
    for columns, diagonals in (
        (flags(4, case.k_len), flags(4, case.k_len, seed=1)),
        (flags(4, case.k_len) & False, flags(4, case.k_len, seed=1)),
        (flags(1, case.k_len), flags(1, case.k_len, seed=3)),
    ):
        found, wanted = (ops.token_stripes(expected, columns, diagonals).mask for ops in (kernels, plain))
        assert torch.equal(found, wanted)


WORDS = [
    {"pattern": "flexprefill", "gamma": 0.5, "min_budget": 128},
    {"pattern": "flexprefill", "gamma": 0.7, "tau": 0.6, "min_budget": 128},
    {"pattern": "flexprefill", "gamma": 0.6, "tau": 0.0, "min_budget": 128},
    {"pattern": "flexprefill", "gamma": 1.0},
    {"pattern": "xattention", "threshold": 0.6},
    {"pattern": "xattention", "threshold": 0.8, "stride": 16},
    {"pattern": "minference", "vertical": 40, "slash": 60},
    {"pattern": "anchor", "theta": 4.9, "step": 2},
    {"pattern": "zipvl", "tau": 0.05, "window": 40},
    {"pattern": "hip", "window": 256, "first_tokens": 256, "second_tokens": 128, "tokens": 128},
    {"pattern": "streaming", "sinks": 20, "window": 100},
]


@pytest.mark.parametrize("words", WORDS, ids=lambda words: words["pattern"])
@pytest.mark.parametrize("case", [Case(300, 1035), Case(1024, 1536), Case(20, 700), Case(1035, 1035, group=3)])
def test_patterns_plan_the_same(words: dict[str, object], case: Case, device: torch.device) -> None:
    pattern = make_pattern(words)
    assert pattern is not None
    chunk, expected = case.make(device)
    found, wanted = pattern.plan(chunk).mask, pattern.plan(expected).mask
    assert found.shape == wanted.shape
    # Ties apart, which rounding decides.
    assert (found != wanted).float().mean() < 2e-3


def test_heads_with_kinds_of_their_own(device: torch.device) -> None:
    table = torch.tensor([[[0, 40, 60], [1, 50, 100], [2, 4, 0], [0, 100, 200]]])
    pattern = make_pattern({"pattern": "minference"})
    assert pattern is not None
    plans = [
        pattern.plan(replace(chunk, calibration={"minference.heads": table})).mask
        for chunk in Case(300, 1035).make(device)
    ]
    assert (plans[0] != plans[1]).float().mean() < 2e-3
