"""The highest scores of many rows at once, against a plain sort."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.selection import among_top, force, keep_top, left_over
from tests.device import DEVICE

quick = settings(deadline=None, derandomize=True, max_examples=300)
LARGEST = torch.finfo(torch.float32).max
SMALLEST = 2.0**-149
# Few values, so that ties are common.
AWKWARD = st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, LARGEST, -LARGEST, SMALLEST, -SMALLEST, 1.5])


def top(scores: Sequence[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda position: (-scores[position], position))[:count])


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[float]], list[int]]:
    """Rows of scores, and how many to keep of each: any number, or the same of every row, or all."""
    value = draw(st.sampled_from([AWKWARD, st.floats(width=32, allow_nan=False), st.integers(-2, 2).map(float)]))
    n, rows = draw(st.integers(1, 40)), draw(st.integers(1, 6))
    scores = draw(st.lists(st.lists(value, min_size=n, max_size=n), min_size=rows, max_size=rows))
    count = draw(st.sampled_from([st.integers(0, n), st.just(draw(st.integers(0, n))), st.just(n)]))
    return scores, draw(st.lists(count, min_size=rows, max_size=rows))


def assert_kept(scores: list[list[float]], counts: list[int]) -> None:
    kept = keep_top(torch.tensor(scores, device=DEVICE), torch.tensor(counts))
    n, most = len(scores[0]), max(counts)
    assert kept.dtype == torch.int64 and kept.shape == (len(scores), most)
    for row, values, count in zip(kept.tolist(), scores, counts, strict=True):
        assert row == top(values, count) + [n] * (most - count)


@quick
@given(problems())
def test_equals_a_plain_sort(problem: tuple[list[list[float]], list[int]]) -> None:
    assert_kept(*problem)


@pytest.mark.parametrize(
    "scores",
    [
        [0.0, -0.0, 0.0, -0.0, -0.0],
        [-0.0, 0.0, -0.0, 0.0, 0.0],
        [-1.0, -2.0, -3.0, -1.0, -0.5],
        [math.inf, -math.inf, math.inf, 0.0, -math.inf],
        [-math.inf] * 5,
        [LARGEST, math.inf, -LARGEST, -math.inf, LARGEST],
        [SMALLEST, 0.0, -SMALLEST, -0.0, SMALLEST],
        [1.0, 1.0 + 2**-23, 1.0 - 2**-24, 1.0, 1.0],
    ],
    ids=str,
)
def test_every_count_of_awkward_scores(scores: list[float]) -> None:
    for count in range(6):
        assert_kept([scores], [count])
    assert_kept([scores] * 6, list(range(6)))
    assert_kept([scores] * 6, [5, 0, 3, 3, 1, 4])


def test_zeros_of_both_signs_tie() -> None:
    assert keep_top(torch.tensor([[-0.0, 0.0, -0.0]]), torch.tensor([1])).tolist() == [[0]]
    assert keep_top(torch.tensor([[-1.0, -0.0, 0.0]]), torch.tensor([1])).tolist() == [[1]]


def test_long_rows_with_ties() -> None:
    """As long as a prompt, few different values: the order of positions above 2**16 counts too."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-3, 3, (3, 70_000), generator=generator).float() / 7
    assert_kept(scores.tolist(), [69_999, 1234, 40_000])


def test_what_is_forced_stays_first_in_line() -> None:
    """Also among scores that are infinite or NaN themselves."""
    scores = torch.tensor([[math.nan, -math.inf, math.inf, math.nan, 0.0, -1.0], [-math.inf] * 6], device=DEVICE)
    kept = keep_top(force(scores, sinks=1, recent=2), torch.tensor([4, 3]))
    assert kept.tolist() == [[0, 2, 4, 5], [0, 4, 5, 6]]


def test_scores_stay_as_they_are() -> None:
    scores = torch.tensor([[-0.0, 3.0, math.inf, -2.0]])
    before = scores.clone()
    keep_top(scores, torch.tensor([2]))
    assert torch.equal(scores.view(torch.int32), before.view(torch.int32))


def test_rows_of_a_larger_tensor() -> None:
    """Not contiguous: every other column, rows of a part."""
    scores = torch.randn(4, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    part = scores[1:, ::2]
    assert torch.equal(keep_top(part, torch.tensor([3, 0, 10])), keep_top(part.clone(), torch.tensor([3, 0, 10])))
    assert_kept(part.tolist(), [3, 0, 10])


@quick
@given(problems())
def test_a_count_for_all_rows_keeps_the_same(problem: tuple[list[list[float]], list[int]]) -> None:
    scores, counts = problem
    chosen = among_top(torch.tensor(scores, device=DEVICE), counts[0])
    assert chosen.shape == (len(scores), len(scores[0])) and chosen.dtype == torch.bool
    for row, values in zip(chosen.tolist(), scores, strict=True):
        assert [position for position, kept in enumerate(row) if kept] == top(values, counts[0])


@quick
@given(problems())
def test_what_is_left_over_is_all_else(problem: tuple[list[list[float]], list[int]]) -> None:
    scores, counts = problem
    n, most = len(scores[0]), len(scores[0]) - min(counts)
    kept = keep_top(torch.tensor(scores, device=DEVICE), torch.tensor(counts))
    for row, other in zip(kept.tolist(), left_over(kept, n, most).tolist(), strict=True):
        expected = [position for position in range(n) if position not in row]
        assert other == expected + [n] * (most - len(expected))


@pytest.mark.parametrize("counts", [[6, 1], [1, 6], [-1, 1], [2, -1]])
def test_impossible_counts_are_errors(counts: list[int]) -> None:
    with pytest.raises(ValueError, match=r"cannot keep .* of 5 tokens"):
        keep_top(torch.zeros(2, 5), torch.tensor(counts))
