"""Budgets over layers: exact sums within bounds, whatever the weights; and room for what is forced."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvcache.allocation import apportion, pyramid_shares
from kvcache.compressor import Compressor
from kvcache.pages import PageGeometry, PermutedCodec
from kvcache.plan import RetentionPlan, minimum_budget, plan_retention
from kvcache.registry import make_policy
from kvcache.tables import PageTables
from tests.kvcache.brute_force import shared

quick = settings(deadline=None, derandomize=True, max_examples=150)
PAGE_SIZES = st.sampled_from([16, 32, 64, 128])


@st.composite
def problems(draw: st.DrawFn, weight: st.SearchStrategy[float]) -> tuple[list[float], int, int, int]:
    """Weights, a sum that can be reached, and the bounds."""
    weights = draw(st.lists(weight, min_size=1, max_size=24))
    low = draw(st.integers(0, 6))
    high = draw(st.integers(low, 40))
    return weights, draw(st.integers(low * len(weights), high * len(weights))), low, high


def share(weights: list[float], total: int, low: int, high: int) -> list[int]:
    result = apportion(torch.tensor(weights, dtype=torch.float64), total, low, high)
    assert result.dtype == torch.int64
    return result.tolist()


@quick
@given(problems(st.floats(-5, 1000, allow_nan=False) | st.just(0.0)))
def test_sum_is_exact_and_bounds_hold(problem: tuple[list[float], int, int, int]) -> None:
    weights, total, low, high = problem
    result = share(weights, total, low, high)
    assert sum(result) == total
    assert low <= min(result) and max(result) <= high


@quick
@given(problems(st.integers(1, 60).map(float)))
def test_shares_are_the_real_ones_rounded_by_largest_remainder(problem: tuple[list[float], int, int, int]) -> None:
    """Against water-filling in exact fractions; of equal remainders the lower index wins."""
    weights, total, low, high = problem
    assert share(*problem) == shared([Fraction(weight) for weight in weights], total, low, high)[1]


@quick
@given(problems(st.integers(1, 60).map(float)), st.randoms(use_true_random=False))
def test_order_does_not_matter(problem: tuple[list[float], int, int, int], random: Random) -> None:
    weights, total, low, high = problem
    reals, _ = shared([Fraction(weight) for weight in weights], total, low, high)
    assume(len({real % 1 for real in reals}) == len({*weights}))  # equal remainders go by index, so order matters
    order = list(range(len(weights)))
    random.shuffle(order)
    result, shuffled = share(*problem), share([weights[i] for i in order], total, low, high)
    assert sorted(shuffled) == sorted(result)
    assert all(abs(shuffled[at] - result[i]) <= (weights.count(weights[i]) > 1) for at, i in enumerate(order))


@quick
@given(problems(st.integers(1, 60).map(float)))
def test_more_weight_never_gets_less(problem: tuple[list[float], int, int, int]) -> None:
    pairs = sorted(zip(problem[0], share(*problem), strict=True))
    for (lighter, less), (heavier, more) in pairwise(pairs):
        assert less <= more if lighter < heavier else abs(less - more) <= 1


@quick
@given(st.lists(st.integers(0, 500), min_size=1, max_size=80))
def test_whole_weights_that_sum_up_stay_as_they_are(weights: list[int]) -> None:
    assert share([float(weight) for weight in weights], sum(weights), 0, 500) == weights
    assert share([float(weight) for weight in weights], sum(weights), min(weights), max(weights)) == weights


@pytest.mark.parametrize("weights", [[1.0, 9.0, 0.0], [0.0, 0.0, 0.0], [1e9, 1e-9, 5.0]])
def test_equal_bounds_leave_no_choice(weights: list[float]) -> None:
    assert share(weights, 12, 4, 4) == [4, 4, 4]
    assert share(weights, 0, 0, 7) == [0, 0, 0]
    assert share(weights, 21, 0, 7) == [7, 7, 7]


def test_small_examples() -> None:
    assert share([1, 1, 1], 4, 0, 9) == [2, 1, 1]
    assert share([5, 5, 4, 11, 5, 7, 1], 23, 0, 4) == [4, 4, 3, 4, 4, 4, 0]  # of four equal remainders, the first three
    assert share([8, 1, 1], 10, 0, 4) == [4, 3, 3]
    assert share([8, 1, 1], 10, 2, 9) == [6, 2, 2]
    assert share([0, 0, 6], 6, 0, 4) == [1, 1, 4]


@pytest.mark.parametrize(("total", "low", "high"), [(5, 2, 9), (28, 2, 9), (1, 0, 0), (-1, 0, 9), (9, 4, 3)])
def test_impossible_shares_are_errors(total: int, low: int, high: int) -> None:
    with pytest.raises(ValueError, match=f"cannot share {total} over 3 entries of at least {low} and at most {high}"):
        share([1.0, 1.0, 1.0], total, low, high)


@quick
@given(
    prompt_len=st.integers(200, 100_000), budget=st.integers(60, 5000), window=st.integers(1, 50),
    beta=st.integers(1, 1000), num_layers=st.integers(1, 128),
)  # fmt: skip
def test_pyramid_shares_sum_up_and_fall(prompt_len: int, budget: int, window: int, beta: int, num_layers: int) -> None:
    assume(budget < prompt_len)
    shares = pyramid_shares(num_layers, budget, prompt_len, window, beta)
    assert float(shares.sum()) == pytest.approx(num_layers * budget, rel=1e-12)
    assert (shares.diff() <= 0).all()
    assert shares.max() <= prompt_len and shares.min() >= 0


def page_counts(
    words: dict[str, object],
    plan: RetentionPlan,
    num_layers: int,
    scores: torch.Tensor | None = None,
    statistics: torch.Tensor | None = None,
) -> torch.Tensor:
    """Of two KV heads."""
    geometry = PageGeometry((0,) * num_layers, 2, 2, plan.page_size, 4)
    codec = PermutedCodec.plain(plan.page_size, 4)
    policy = make_policy(words)
    assert policy is not None
    tables = PageTables(geometry, slots=1, width=1)
    return Compressor(geometry, codec, torch.empty(0), tables, scale=1.0)._page_counts(
        policy, plan, torch.empty(0) if scores is None else scores, statistics
    )


@quick
@given(
    window=st.integers(1, 300), sinks=st.integers(0, 300), beta=st.integers(1, 1000), page_size=PAGE_SIZES,
    num_layers=st.integers(1, 80), extra=st.integers(0, 400) | st.just(0), longer=st.integers(1, 3000),
)  # fmt: skip
def test_every_allowed_budget_has_room_for_forced_tokens_in_every_layer(
    window: int, sinks: int, beta: int, page_size: int, num_layers: int, extra: int, longer: int
) -> None:
    budget = minimum_budget(sinks, window, page_size) + extra
    prompt_len = budget + longer
    plan = plan_retention(prompt_len, budget, page_size)
    assert plan is not None
    assert budget - page_size < plan.kept_tokens <= budget
    plan = replace(plan, pinned=sinks)
    words: dict[str, object] = {"policy": "pyramidkv", "window": window, "sinks": sinks, "beta": beta, "budget": budget}
    counts = page_counts(words, plan, num_layers)
    forced = {*range(sinks), *range(prompt_len - window, prompt_len)} & set(range(plan.full_pages * page_size))
    assert int(counts.min()) * page_size >= len(forced)
    assert int(counts.max()) <= plan.full_pages
    assert int(counts.sum()) == plan.kept_pages * num_layers * 2
    assert (counts.diff(dim=0) <= 0).all() and torch.equal(counts[:, 0], counts[:, 1])


AWKWARD = st.sampled_from([0.0, 1.0, -1.0, 0.5, 3e38, -3e38, math.inf, -math.inf, math.nan])


@quick
@given(
    layers=st.sampled_from(["uniform", "zigzag", "zipvl"]), floor=st.floats(0, 1), bound=st.floats(0, 1),
    sinks=st.integers(0, 40), window=st.integers(1, 40), extra=st.integers(0, 60), longer=st.integers(1, 200),
    statistics=st.lists(st.floats(1, 500), min_size=1, max_size=5), data=st.data(),
)  # fmt: skip
def test_shares_by_the_prompt_sum_up_and_hold_what_is_forced(
    layers: str, floor: float, bound: float, sinks: int, window: int, extra: int, longer: int,
    statistics: list[float], data: st.DataObject,
) -> None:  # fmt: skip
    """Whatever the scores: of competing heads, each layer's total is the one that equal heads would have."""
    budget, num_layers = minimum_budget(sinks, window, 16) + extra, len(statistics)
    plan = plan_retention(budget + longer, budget, 16)
    assert plan is not None
    plan = replace(plan, pinned=sinks)
    words: dict[str, object] = {"policy": "snapkv", "window": window, "sinks": sinks, "budget": budget}
    words |= {"layers": layers} | ({"bound": bound} if layers == "zigzag" else {})
    numbers = None if layers == "uniform" else torch.tensor(statistics, dtype=torch.float64)
    scores = torch.randn(num_layers, 2, plan.full_pages * 16, generator=torch.Generator().manual_seed(longer))
    scores[:, 0] *= data.draw(st.sampled_from([1.0, 0.0, 30.0]))
    for at in data.draw(st.lists(st.integers(0, scores.numel() - 1), max_size=40)):
        scores.view(-1)[at] = data.draw(AWKWARD)
    equal = page_counts(words, plan, num_layers, None, numbers)
    counts = page_counts({**words, "heads": "adakv", "floor": floor}, plan, num_layers, scores, numbers)
    assert torch.equal(counts.sum(1), equal.sum(1)) and torch.equal(equal[:, 0], equal[:, 1])
    assert int(counts.sum()) == plan.kept_pages * num_layers * 2
    forced = len({*range(sinks), *range(plan.prompt_len - window, plan.prompt_len)} & {*range(plan.full_pages * 16)})
    for result in (equal, counts):
        assert int(result.min()) * 16 >= forced and int(result.min()) >= 1 and int(result.max()) <= plan.full_pages
    if layers != "uniform":
        order = sorted(range(num_layers), key=lambda layer: statistics[layer])
        assert all(b - a >= -1 for a, b in pairwise(equal[order, 0].tolist()))


@quick
@given(st.integers(1, 5000), st.integers(1, 5000), PAGE_SIZES)
def test_plan_arithmetic(prompt_len: int, budget: int, page_size: int) -> None:
    tail = prompt_len % page_size
    if budget >= prompt_len:
        assert plan_retention(prompt_len, budget, page_size) is None
    elif budget < page_size + tail:
        with pytest.raises(ValueError, match="leaves no page"):
            plan_retention(prompt_len, budget, page_size)
    else:
        plan = plan_retention(prompt_len, budget, page_size)
        assert plan is not None and plan.tail == tail
        assert plan.full_pages * page_size + plan.tail == prompt_len
        assert budget - page_size < plan.kept_tokens <= budget
        assert plan.kept_tokens % page_size == tail
        assert plan.freed_blocks == plan.full_pages - plan.kept_pages >= 0


@pytest.mark.parametrize(
    ("prompt_len", "sinks", "recent", "pages"),
    [
        (160, 0, 0, 1),
        (160, 4, 12, 1),
        (160, 4, 13, 2),
        (165, 4, 17, 1),
        (165, 4, 18, 2),
        (165, 16, 5, 1),
        (175, 17, 0, 2),
    ],
)
def test_pages_for_forced_tokens(prompt_len: int, sinks: int, recent: int, pages: int) -> None:
    assert RetentionPlan(prompt_len, 16, 5, pinned=sinks).min_pages(recent) == pages
