"""When a request is compacted, and how much it keeps: against lists of boundaries and plain arithmetic."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.plan import RetentionPlan, minimum_budget, plan_retention, whole_pages
from kvcache.policies.base import Policy
from kvcache.registry import make_policy
from tests.kvcache.synthetic import PAGE

END = 2000
pages = st.sampled_from([1, 4, 16, 32, 128])


def built(order: dict[str, Any]) -> Policy:
    policy = make_policy(order)
    assert policy is not None
    return policy


def boundaries(plan: RetentionPlan) -> list[int]:
    """All up to END, token by token: the first at its place, then whenever an interval of pages is full."""
    found, since = [], 0
    for computed in range(1, END + 1):
        if computed == plan.prompt_len:
            found.append(computed)
            since = plan.prompt_len % plan.page_size
        elif found:
            since += 1
            if plan.interval and since == plan.interval:
                found.append(computed)
                since = 0
    return found


@st.composite
def plans(draw: st.DrawFn) -> RetentionPlan:
    page = draw(pages)
    prompt_len = draw(st.integers(page, 600))
    kept = draw(st.integers(1, prompt_len // page))
    interval = page * draw(st.integers(0, 200 // page + 1))
    return RetentionPlan(prompt_len, page, kept, pinned=draw(st.integers(0, 4)), interval=interval)


@given(plans(), st.integers(0, END - 400))
def test_boundaries_are_those_of_the_list(plan: RetentionPlan, computed: int) -> None:
    listed = boundaries(plan)
    assert plan.last_boundary(computed) == max([b for b in listed if b <= computed], default=0)
    assert plan.next_boundary(computed) == min([b for b in listed if b > computed], default=None)


@given(plans())
def test_boundaries_follow_each_other(plan: RetentionPlan) -> None:
    """Each is the next of the one before; the first anywhere, the others at full pages, an interval apart."""
    listed, at = boundaries(plan), 0
    for boundary in listed:
        following = plan.next_boundary(at)
        assert following == boundary and plan.last_boundary(boundary) == boundary
        assert plan.last_boundary(boundary - 1) == at
        at = boundary
    assert listed[0] == plan.prompt_len
    assert (len(listed) == 1) == (not plan.interval)
    assert all(boundary % plan.page_size == 0 for boundary in listed[1:])
    assert all(b - a == plan.interval for a, b in pairwise(listed[1:]))
    if plan.interval:
        assert 0 < listed[1] - listed[0] <= plan.interval < listed[1] - listed[0] + plan.page_size


@given(st.integers(0, 10_000), pages)
def test_whole_pages(tokens: int, page: int) -> None:
    found = whole_pages(tokens, page)
    assert found % page == 0 and tokens <= found < tokens + page


@given(st.integers(1, 3000), st.integers(1, 3000), pages)
def test_a_plan_keeps_the_most_that_fits(prompt_len: int, budget: int, page: int) -> None:
    if budget >= prompt_len:
        assert plan_retention(prompt_len, budget, page) is None
    elif budget < prompt_len % page + page:
        with pytest.raises(ValueError, match="leaves no page"):
            plan_retention(prompt_len, budget, page)
    else:
        plan = plan_retention(prompt_len, budget, page)
        assert plan is not None and (plan.prompt_len, plan.page_size) == (prompt_len, page)
        assert budget - page < plan.kept_tokens <= budget
        assert plan.full_pages * page + plan.tail == prompt_len and 0 <= plan.tail < page
        assert plan.kept_tokens == plan.kept_pages * page + plan.tail
        assert plan.freed_blocks == (prompt_len - plan.kept_tokens) // page


@given(st.integers(0, 100), st.integers(0, 300), pages, st.integers(0, 400), st.sampled_from([0, 1]))
def test_the_smallest_budget_has_room_for_what_is_forced(
    sinks: int, recent: int, page: int, more: int, repeats: int
) -> None:
    """At any length; later compactions have no tail that the last tokens could lie in."""
    budget = minimum_budget(sinks, recent, page)
    plan = plan_retention(budget + 1 + more, budget, page)
    assert plan is not None
    plan = RetentionPlan(plan.prompt_len, page, plan.kept_pages, pinned=sinks, interval=repeats * page)
    least = plan.min_pages(recent)
    assert 1 <= least <= plan.kept_pages
    forced = sinks + (recent if repeats else max(0, recent - plan.tail))
    assert least * page >= forced > (least - 1) * page or (forced, least) == (0, 1)


# What a policy plans


def plan_of(prompt_len: int, **order: Any) -> RetentionPlan | None:
    return built({"policy": "streamingllm", "sinks": 3, **order}).plan(prompt_len, PAGE)


@pytest.mark.parametrize("interval", [1, 16, 17, 64, 100])
@pytest.mark.parametrize(
    ("prompt_len", "first"),
    [
        (300, 300), (101, 101), (100, None), (99, None), (97, None), (96, None), (50, None), (16, None), (1, None),
    ],
)  # fmt: skip
def test_prompts_over_at_and_under_the_budget(prompt_len: int, first: int | None, interval: int) -> None:
    """One that fits has to grow until budget and interval are full: 112 tokens are 100 in whole pages."""
    step = -(-interval // PAGE) * PAGE
    plan = plan_of(prompt_len, budget=100, interval=interval)
    assert plan is not None and (plan.interval, plan.pinned, plan.page_size) == (step, 3, PAGE)
    assert plan.prompt_len == (first or 112 + step)
    assert plan.kept_pages == (100 - plan.prompt_len % PAGE) // PAGE
    alone = plan_of(prompt_len, budget=100)
    assert (alone is None) == (first is None)
    if alone:
        assert (alone.prompt_len, alone.kept_pages, alone.interval) == (prompt_len, plan.kept_pages, 0)


@pytest.mark.parametrize(("suffix", "seen"), [(0, 300), (1, 299), (100, 200), (199, 101)])
def test_a_suffix_comes_after_the_compaction(suffix: int, seen: int) -> None:
    plan = plan_of(300, budget=100, suffix=suffix)
    assert plan is not None and (plan.prompt_len, plan.question) == (seen, (0, 0))
    assert plan.kept_pages == (100 - seen % PAGE) // PAGE


@pytest.mark.parametrize(
    ("suffix", "budget", "seen"), [(1, 100, 299), (49, 100, 251), (50, 101, 250), (100, 151, 200), (149, 200, 368)]
)
def test_compactions_of_the_answer_have_room_for_the_suffix(suffix: int, budget: int, seen: int) -> None:
    """Beside 3 sinks, a page and two pages; a budget that is too small for that is as good as raised."""
    plan = plan_of(300, budget=100, suffix=suffix, interval=64)
    if seen == 368:  # 151 tokens and the suffix: there is nothing to drop before the answer has grown
        assert plan == RetentionPlan(304 + 64, PAGE, 200 // PAGE, pinned=3, interval=64, question=(151, 300))
        return
    assert plan is not None and (plan.prompt_len, plan.question) == (seen, (300 - suffix, 300))
    assert plan.kept_pages == (budget - seen % PAGE) // PAGE
    assert plan.min_pages(5) == -(-(3 + suffix + 5) // PAGE)


@pytest.mark.parametrize("suffix", [200, 201, 299, 300, 301, 10**9])
def test_a_suffix_that_leaves_no_more_than_the_budget(suffix: int) -> None:
    """Nothing to compact; with an interval the answer has to grow behind the whole prompt, the suffix in it."""
    assert plan_of(300, budget=100, suffix=suffix) is None
    plan, held = plan_of(300, budget=100, suffix=suffix, interval=64), min(suffix, 300)
    seen = max(304, -(-(51 + held) // PAGE) * PAGE) + 64
    assert plan == RetentionPlan(seen, PAGE, (51 + held) // PAGE, pinned=3, interval=64, question=(300 - held, 300))


@pytest.mark.parametrize("prompt_len", [303, 304, 305])
def test_an_answer_has_an_interval_behind_the_page_that_its_first_token_is_in(prompt_len: int) -> None:
    plan = plan_of(prompt_len, budget=prompt_len, interval=32)
    assert plan is not None and plan.prompt_len == (304 if prompt_len == 303 else 320) + 32


@pytest.mark.parametrize(
    ("prompt_len", "suffix", "budget", "seen", "kept"),
    [
        (1000, 0, "25%", 1000, (250 - 8) // 16),
        (1000, 200, "25%", 800, 200 // 16),  # of what compression sees
        (1000, 999, "50%", None, None),
        (1000, 0, "100%", None, None),
        (1000, 0, "0.1%", 1000, (51 - 8) // 16),  # the smallest budget: 3 sinks, a page, two pages
        (51, 0, "1%", None, None),
        (52, 0, "1%", 52, (51 - 4) // 16),
    ],
)
def test_budgets_that_are_shares(prompt_len: int, suffix: int, budget: str, seen: int | None, kept: int | None) -> None:
    plan = plan_of(prompt_len, budget=budget, suffix=suffix)
    assert (plan and plan.prompt_len, plan and plan.kept_pages) == (seen, kept)


@pytest.mark.parametrize(
    ("prompt_len", "suffix", "budget", "seen", "kept"),
    [(1000, 0, "100%", 1008 + 32, 1000 // 16), (1000, 1, "50%", 999, (500 - 7) // 16), (40, 0, "50%", 64 + 32, 3)],
)
def test_shares_of_prompts_that_have_to_grow(prompt_len: int, suffix: int, budget: str, seen: int, kept: int) -> None:
    assert plan_of(prompt_len, budget=budget, suffix=suffix, interval=32) == RetentionPlan(
        seen, PAGE, kept, pinned=3, interval=32, question=(prompt_len - suffix, prompt_len) if suffix else (0, 0)
    )


@pytest.mark.parametrize("budget", [1, 64, 70, 80, 200, "50%"])
@pytest.mark.parametrize("prompt_len", [1, 15, 16, 17, 300])
def test_raas_pins_the_prompt(prompt_len: int, budget: int | str) -> None:
    """Its budget is the answer's: whole pages, beside those of the prompt; a window and two pages at least."""
    plan = built({"policy": "raas", "budget": budget, "sinks": 3, "interval": 40, "window": 20}).plan(prompt_len, PAGE)
    tokens = budget if isinstance(budget, int) else -(-prompt_len // 2)
    prompt, answer = -(-prompt_len // PAGE), max(tokens, 20 + 3 + 2 * PAGE) // PAGE
    assert plan == RetentionPlan((prompt + answer + 3) * PAGE, PAGE, prompt + answer, pinned=prompt_len, interval=48)
    assert plan.tail == 0 and plan.min_pages(20) <= plan.kept_pages


@given(st.integers(1, 400), st.integers(1, 300), st.integers(0, 400), st.integers(1, 100), pages)
def test_any_plan_can_be_carried_out(prompt_len: int, budget: int, suffix: int, interval: int, page: int) -> None:
    """First compactions come within the prompt or behind its end; what is forced fits; something is freed or kept."""
    for name in ("tova", "raas"):
        order = {"policy": name, "budget": budget, "suffix": suffix, "interval": interval, "window": 1}
        policy = built(order)
        plan = policy.plan(prompt_len, page)
        assert plan is not None and plan.interval % page == 0 and 0 <= plan.interval - interval < page
        assert plan.prompt_len == prompt_len - suffix or plan.prompt_len > prompt_len
        assert plan.min_pages(policy.recent) <= plan.kept_pages <= plan.full_pages
        assert plan.kept_tokens <= plan.prompt_len and plan.freed_blocks >= 0
        if plan.prompt_len > prompt_len:
            assert plan.tail == 0 and plan.prompt_len > prompt_len + plan.interval - page
