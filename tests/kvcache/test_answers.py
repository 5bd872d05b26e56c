"""Answers that are compacted every interval: what stays, where it lies, and that attention over it is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kvcache.registry import policies
from tests.kvcache.answers import Growing, grown
from tests.kvcache.synthetic import PAGE, SINKS, WINDOW, PagedCache, bits, words

BUDGET, INTERVAL, LENGTH = 70, 30, 320
STEP = 32
"""The interval in whole pages."""
REPEATING = sorted(name for name, policy in policies().items() if policy.repeats())
CARRYING = ["h2o", "lfa", "lra", "raas"]
ORDERS: dict[str, dict[str, Any]] = {
    name: words(name, 40 if name == "raas" else BUDGET, interval=INTERVAL) for name in REPEATING
}
ORDERS |= {
    "snapkv, pyramid": words("snapkv", BUDGET, interval=INTERVAL, layers="pyramid"),
    "keydiff, zigzag": words("keydiff", BUDGET, interval=INTERVAL, layers="zigzag"),
    "l2norm, pyramid": words("l2norm", BUDGET, interval=STEP, layers="pyramid", beta=3),
    "lra, zigzag": words("lra", BUDGET, interval=INTERVAL, layers="zigzag", mass=0.5),
    "lfa, window": words("lfa", BUDGET, interval=STEP, window=STEP, top=5),
    "raas, zigzag": words("raas", 70, interval=INTERVAL, layers="zigzag", bound=0.0, alpha=0.02),
    "h2o, recent": words("h2o", BUDGET, interval=INTERVAL, recent_share=0.8, watch=30),
    "snapkv, suffix": words("snapkv", BUDGET, interval=STEP, suffix=21, window=STEP),
    "tova, suffix": words("tova", BUDGET, interval=INTERVAL, suffix=1, window=1),
    "l2norm, long suffix": words("l2norm", 96, interval=INTERVAL, suffix=30, layers="pyramid"),
    "h2o, long suffix": words("h2o", 96, interval=INTERVAL, suffix=39, recent_share=0.8),
}


def cache_of(prompt_len: int, length: int = LENGTH, **shape: Any) -> PagedCache:
    return PagedCache(prompt_len, new=length - prompt_len, uneven=True, seed=prompt_len, **shape)


@pytest.fixture(scope="module", params=[50, 144, 150, 159])
def prompt_len(request: pytest.FixtureRequest) -> int:
    """Under the budget; without a tail, with one of 6 tokens, and with one of 15."""
    return request.param


@pytest.fixture(scope="module", params=ORDERS)
def order(request: pytest.FixtureRequest) -> dict[str, Any]:
    return ORDERS[request.param]


@pytest.fixture(scope="module")
def request_(order: dict[str, Any], prompt_len: int) -> Growing:
    cache = cache_of(prompt_len, num_heads=6, num_kv_heads=2, num_layers=3, block_major=prompt_len % 2 == 1)
    return grown(cache, order, LENGTH)


def test_every_policy_that_repeats_is_here() -> None:
    assert (
        {"raas", "h2o", "rkv", "lra", "lfa", "streamingllm", "snapkv"}
        <= set(REPEATING)
        == {order["policy"] for order in ORDERS.values()}
    )


def test_it_is_compacted_at_each_boundary(request_: Growing, prompt_len: int) -> None:
    order, boundaries = request_.order, [compaction.boundary for compaction in request_.done]
    if order["policy"] == "raas":
        answer = max(order["budget"], PAGE + SINKS + 2 * PAGE) // PAGE * PAGE
        first = -(-prompt_len // PAGE) * PAGE + answer + STEP
    elif prompt_len > BUDGET:
        first = prompt_len - order.get("suffix", 0)
    else:  # the budget in whole pages, and an interval
        first = -(-max(order["budget"], request_.policy.minimum_budget(PAGE)) // PAGE) * PAGE + STEP
    whole = first // PAGE * PAGE
    assert boundaries == [first, *range(whole + STEP, LENGTH, STEP)] and len(boundaries) > 1


def test_kept_positions(request_: Growing) -> None:
    """Unique, ascending, below the boundary; nothing comes back; what is forced stays, a suffix of the prompt too."""
    plan, name = request_.plan, request_.order["policy"]
    prompt, suffix = request_.cache.prompt_len, request_.order.get("suffix", 0)
    sinks = prompt if name == "raas" else SINKS
    there = [[set[int]() for _ in heads] for heads in request_.done[0].kept]
    end = 0
    for compaction in request_.done:
        tail = plan.tail if compaction is request_.done[0] else 0
        below = compaction.boundary - tail
        for layer, heads in enumerate(compaction.kept):
            for head, positions in enumerate(heads):
                held = positions.tolist()
                assert held == sorted(set(held)) and 0 <= held[0] <= held[-1] < below
                assert set(held) <= there[layer][head] | set(range(end, below)), "an evicted token came back"
                there[layer][head] = set(held)
                tokens = len(held) + tail
                window = request_.order.get("window", WINDOW)
                recent = {"streamingllm": 0, "h2o": tokens // 2}.get(name, window)
                if "recent_share" in request_.order:
                    recent = min(int(0.8 * tokens + 1e-9), tokens - SINKS - suffix)
                assert {*range(sinks), *range(compaction.boundary - recent, below)} <= set(held)
                assert {*range(prompt - suffix, min(prompt, below))} <= set(held)
        end = below


def test_counts_are_exact_and_stay(request_: Growing) -> None:
    plan, geometry = request_.plan, request_.cache.geometry
    counts = request_.done[0].counts
    assert sum(map(sum, counts)) == plan.kept_pages * geometry.num_layers * geometry.num_kv_heads
    seen: float = plan.prompt_len
    for number, compaction in enumerate(request_.done):
        assert compaction.counts == counts
        tail = plan.tail if number == 0 else 0
        for layer, heads in enumerate(compaction.kept):
            assert [len(positions) for positions in heads] == [count * PAGE for count in counts[layer]]
        report = compaction.report
        assert report.layer_tokens == [sum(row) / len(row) * PAGE + tail for row in counts]
        assert (report.boundary, report.nan_scores, report.request_id) == (compaction.boundary, 0, "r")
        if number:
            before = request_.done[number - 1].boundary // PAGE * PAGE
            seen = plan.kept_pages * PAGE + compaction.boundary - before
        freed = seen // PAGE - plan.kept_pages
        assert report.tokens_seen == pytest.approx(seen) and report.blocks_freed == freed
        assert report.tokens_kept == pytest.approx(plan.kept_pages * PAGE + tail)


def test_layers_differ_where_the_allocator_says_so(request_: Growing) -> None:
    differ = len({sum(row) for row in request_.done[0].counts}) > 1
    if request_.plan.prompt_len > 2 * BUDGET or not request_.policy.layers.lengths_differ:
        assert differ == request_.policy.layers.lengths_differ


def test_pages_hold_the_tokens_of_their_positions(order: dict[str, Any], prompt_len: int) -> None:
    """Bit for bit, after each compaction and just before the next: kept ones and those that came since."""
    cache = cache_of(prompt_len, num_layers=3)
    request = Growing(cache, order)
    stops = [boundary + more for boundary in range(prompt_len, LENGTH - 20, STEP) for more in (1, 17)]
    for stop in stops:
        request.advance(stop)
        if not request.done:
            continue
        for layer, head, positions, keys, values in request.stored():
            assert torch.equal(bits(keys), bits(cache.keys[layer, head, positions]))
            assert torch.equal(bits(values), bits(cache.values[layer, head, positions]))
    assert len(request.done) > 1


def test_only_its_own_pages_are_written(request_: Growing) -> None:
    own = set(request_.cache.geometry.pool_of(request_.targets).tolist())
    for number, compaction in enumerate(request_.done):
        changed = (bits(compaction.before) != bits(compaction.after)).any(1).nonzero().flatten().tolist()
        assert set(changed) <= own
        assert number or set(changed) == own
        assert changed or request_.order["policy"] != "streamingllm", "its window moves on every time"


@pytest.mark.parametrize("chunk", [1, 7])
def test_attention_is_dense_attention_without_the_evicted(order: dict[str, Any], prompt_len: int, chunk: int) -> None:
    cache = cache_of(prompt_len, num_heads=4, num_layers=3)
    request, group = Growing(cache, order), cache.num_heads // cache.geometry.num_kv_heads
    for stop in range(prompt_len + chunk, LENGTH, 11):
        request.advance(stop - chunk)
        first = request.computed
        request.advance(stop, chunk)
        if not request.done or request.boundary > first:  # the step was cut at a boundary
            continue
        for layer, head, positions, keys, values in request.stored():
            queries = cache.queries[layer, first:stop, head * group : (head + 1) * group].transpose(0, 1)
            slots, steps = len(keys), stop - first
            causal = torch.arange(slots) <= torch.arange(slots - steps, slots)[:, None]
            paged = F.scaled_dot_product_attention(queries, keys[None], values[None], causal.to(cache.device))
            visible = torch.arange(stop) <= torch.arange(first, stop)[:, None]
            kept = torch.zeros(stop, dtype=torch.bool)
            kept[positions.cpu()] = True
            every = cache.keys[layer, head, None, :stop], cache.values[layer, head, None, :stop]
            dense = F.scaled_dot_product_attention(queries, *every, (visible & kept).to(cache.device))
            torch.testing.assert_close(paged, dense, atol=1e-5, rtol=0)
    assert len(request.done) > 1


def test_scorers_are_shown_where_tokens_stood_and_what_was_remembered(request_: Growing) -> None:
    """Nothing is remembered of tokens that came since; of all others, the tail of the prompt too, something is."""
    since = 0
    for number, compaction in enumerate(request_.done):
        below = request_.done[number - 1].boundary // PAGE * PAGE if number else 0
        for layer, (positions, history) in enumerate(compaction.shown):
            for head, row in enumerate(positions.tolist()):
                kept = request_.done[number - 1].kept[layer][head].tolist() if number else []
                assert row == [*kept, *range(below, compaction.boundary)]
            if not number or request_.order["policy"] not in CARRYING:
                assert history is None
            else:
                assert history is not None and history.shape == positions.shape
                assert torch.equal(history.isnan(), positions >= since)
        since = compaction.boundary


@pytest.mark.parametrize("chunk", [1, 2, 5, 16])
@pytest.mark.parametrize("policy", ["h2o", "lra", "rkv", "tova", "snapkv"])
def test_a_suffix_or_a_replay_in_chunks_keeps_the_same(policy: str, chunk: int) -> None:
    """As after preemption, when the answer that is known comes in chunks, cut at the boundaries."""
    one, many = (grown(cache_of(150), ORDERS[policy], LENGTH, size) for size in (1, chunk))
    assert len(one.done) == len(many.done) > 2
    for left, right in zip(one.done, many.done, strict=True):
        assert left.boundary == right.boundary
        assert torch.equal(bits(left.after), bits(right.after))


@pytest.mark.parametrize("policy", ["h2o", "lra", "snapkv"])
def test_starting_again_forgets_all_intervals(policy: str) -> None:
    """Preempted between compactions: the replay compacts anew, with tables and evidence of its own."""
    cache = cache_of(150)
    whole = grown(cache_of(150), ORDERS[policy], LENGTH)
    request = grown(cache, ORDERS[policy], 200)
    again = Growing(cache, ORDERS[policy])
    again.compressor = request.compressor
    cache.start(request.compressor, ORDERS[policy])
    again.advance(LENGTH)
    assert [done.boundary for done in again.done] == [done.boundary for done in whole.done]
    for left, right in zip(again.done, whole.done, strict=True):
        assert all(a.equal(b) for x, y in zip(left.kept, right.kept, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("policy", REPEATING)
def test_queries_of_an_interval_that_are_missing_are_an_error(policy: str) -> None:
    request = grown(cache_of(150), ORDERS[policy], 175)
    watched = request.compressor.observers("r")
    request.cache.write(175, 176, request.cache.pages)
    request.computed = 176
    if watched:
        with pytest.raises(RuntimeError, match="of request r were not seen"):
            request.compact(176)
    else:
        request.compact(176)


def test_orders_that_do_not_fit_an_interval_are_errors() -> None:
    request = grown(cache_of(150), ORDERS["l2norm"], 176)
    with pytest.raises(RuntimeError, match=r"doesn't fit the request's plan.*last compacted at 150"):
        request.compact(192)
    with pytest.raises(RuntimeError, match="doesn't fit"):
        request.compact(150)
    request.compact(176)
    with pytest.raises(RuntimeError, match="last compacted at 176"):
        request.compact(176)
