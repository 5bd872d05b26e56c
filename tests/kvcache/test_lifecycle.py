"""What the compressor knows of requests over time: chunks, preemption, neighbours, NaNs, plans that drop nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kvcache.compressor
from attention_plugins.page_rows import page_rows
from kvcache.compressor import Compressor
from kvcache.evidence import Evidence
from kvcache.orders import Compact, Start
from kvcache.plan import RetentionPlan
from kvcache.policies.base import Policy
from kvcache.registry import HEADS, LAYERS, make_policy, policies
from tests.kvcache.synthetic import (
    BUDGETED,
    MODEL,
    PAGE,
    SCALE,
    SINKS,
    WINDOW,
    PagedCache,
    bits,
    compress,
    positions_of,
    words,
)

ALL = BUDGETED
WINDOWED = [name for name in ALL if policies()[name].evidence is Evidence.WINDOW_QUERIES]
SUMMED = [name for name in ALL if policies()[name].evidence is Evidence.COLUMN_SUMS]
OBSERVED = [name for name in ALL if policies()[name].needs - {Evidence.NONE, Evidence.KEYS}]
PROMPT, BUDGET = 150, 70


def built(order: dict[str, Any]) -> Policy:
    policy = make_policy(order)
    assert policy is not None
    return policy


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("budget", [PROMPT, PROMPT + 1, 10**9, "100%"])
def test_budget_that_holds_the_prompt_plans_nothing(policy: str, budget: int | str) -> None:
    assert built(words(policy, budget)).plan(PROMPT, PAGE) is None


@pytest.mark.parametrize("policy", ALL)
def test_prompt_under_the_minimum_budget_plans_nothing(policy: str) -> None:
    """Down to one token: shorter than the window, than the sinks, than a page."""
    least = built(words(policy, 1)).minimum_budget(PAGE)
    assert all(built(words(policy, 1)).plan(n, PAGE) is None for n in range(1, least + 1))
    assert built(words(policy, 1)).plan(least + PAGE, PAGE) is not None


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("prompt_len", [PROMPT, 160])
def test_more_budget_never_keeps_less(policy: str, prompt_len: int) -> None:
    plans = [built(words(policy, budget)).plan(prompt_len, PAGE) for budget in range(1, prompt_len + 3)]
    freed = [plan.freed_blocks if plan else 0 for plan in plans]
    tokens = [plan.kept_tokens if plan else prompt_len for plan in plans]
    assert freed == sorted(freed, reverse=True) and freed[0] > 1
    assert tokens == sorted(tokens) and tokens[0] < tokens[-1]


@pytest.mark.parametrize("policy", OBSERVED)
@pytest.mark.parametrize(
    "chunks", [[1] * PROMPT, [7] * 21 + [3], [PROMPT - 1, 1], [40, 104, 6]], ids=lambda c: f"{len(c)} chunks"
)
def test_any_chunks_give_the_same_kept_set(policy: str, chunks: list[int]) -> None:
    assert sum(chunks) == PROMPT
    whole = compress(PagedCache(PROMPT), words(policy, BUDGET))
    chunked = compress(PagedCache(PROMPT), words(policy, BUDGET), chunks)
    assert positions_of(chunked.kept) == positions_of(whole.kept)


@pytest.mark.parametrize("policy", OBSERVED)
@pytest.mark.parametrize("seen", [0, PROMPT - WINDOW, PROMPT - 1])
def test_missing_queries_are_an_error(policy: str, seen: int) -> None:
    cache = PagedCache(PROMPT)
    compressor = cache.compressor()
    plan = cache.start(compressor, words(policy, BUDGET))
    cache.feed(compressor, [seen])
    with pytest.raises(RuntimeError, match=r"[1-9]\d* [a-z_]+ of request r were not seen"):
        cache.compact(compressor, plan)


@pytest.mark.parametrize("policy", WINDOWED)
def test_query_missing_in_one_layer_is_an_error(policy: str) -> None:
    cache = PagedCache(PROMPT)
    compressor = cache.compressor()
    plan = cache.start(compressor, words(policy, BUDGET))
    cache.feed(compressor, [PROMPT - 1])
    (window,) = compressor.observers("r")
    window.record(0, PROMPT - 1, cache.queries[0, PROMPT - 1 :])
    with pytest.raises(RuntimeError, match="3 window_queries"):
        cache.compact(compressor, plan)


@pytest.mark.parametrize("policy", OBSERVED)
def test_start_again_forgets_queries(policy: str) -> None:
    """Preempted in the middle of the window: what was seen before doesn't count."""
    cache = PagedCache(PROMPT)
    compressor = cache.compressor()
    cache.start(compressor, words(policy, BUDGET))
    cache.feed(compressor, [PROMPT - 2])
    plan = cache.start(compressor, words(policy, BUDGET))
    with pytest.raises(ValueError, match="was next"):
        cache.feed(compressor, [2], first=PROMPT - 2)
    with pytest.raises(RuntimeError):
        cache.compact(compressor, plan)


@pytest.mark.parametrize("policy", ALL)
def test_start_again_forgets_the_table_and_finish_forgets_all(policy: str) -> None:
    cache = PagedCache(PROMPT)
    compressor = cache.compressor()
    assert compressor.slot("r") is None and not compressor.observers("r")
    kept = []
    for _ in range(2):
        plan = cache.start(compressor, words(policy, BUDGET))
        assert compressor.slot("r") is None
        assert bool(compressor.observers("r")) == (policy in OBSERVED)
        cache.feed(compressor, [PROMPT])
        cache.compact(compressor, plan)
        assert compressor.slot("r") is not None and not compressor.observers("r")
        kept.append(positions_of(compressor.kept_positions("r")))
    assert kept[0] == kept[1]
    compressor.finish("r")
    compressor.finish("r")
    assert compressor.slot("r") is None and not compressor.requests


@pytest.mark.parametrize("policy", ALL)
def test_neighbours_do_not_change_a_kept_set(policy: str) -> None:
    """Two requests whose chunks alternate, with plans of their own, against the same request alone."""
    alone = compress(PagedCache(PROMPT), words(policy, BUDGET))
    cache = PagedCache(PROMPT)
    compressor = cache.compressor()
    plan = cache.start(compressor, words(policy, BUDGET))
    cache.start(compressor, words("snapkv", 90), "other")
    for first in range(0, PROMPT, 50):
        cache.feed(compressor, [50], first=first)
        cache.feed(compressor, [50], "other", first=first)
    cache.compact(compressor, plan)
    compressor.finish("other")
    assert positions_of(compressor.kept_positions("r")) == positions_of(alone.kept)


def test_compacted_requests_have_tables_of_their_own() -> None:
    """Two of one prompt at once, in pages of their own: each has the rows it would have alone."""
    cache = PagedCache(PROMPT)
    compressor, orders = cache.compressor(slots=2), {"a": words("pyramidkv", BUDGET), "b": words("snapkv", 90)}
    source, free = cache.blocks.tolist(), cache.free.tolist()
    targets: dict[str, list[int]] = {}
    for name, order in orders.items():
        plan = cache.start(compressor, order, name)
        cache.feed(compressor, [PROMPT], name)
        targets[name], free = free[: plan.kept_pages], free[plan.kept_pages :]
    for name, target in targets.items():
        compressor.compact(Compact(name, source, target, PROMPT)).finish()
    slots = [compressor.slot(name) for name in orders]
    assert sorted(slot for slot in slots if slot is not None) == [0, 1]
    table = cache.block_table(PROMPT // PAGE, PROMPT).expand(2, -1)
    pages, lengths = page_rows(
        compressor.tables,
        torch.tensor(slots, dtype=torch.int32, device=cache.device),
        torch.full((2,), PROMPT, dtype=torch.int32, device=cache.device),
        table,
    )
    heads, held = cache.geometry.num_kv_heads, []
    for i, (name, order) in enumerate(orders.items()):
        alone = compress(PagedCache(PROMPT), order)
        assert positions_of(compressor.kept_positions(name)) == positions_of(alone.kept)
        for layer, head, positions in alone.heads():
            at = (layer, i * heads + head)
            assert lengths[at] == len(positions) + PROMPT % PAGE
            own = pages[at][: len(positions) // PAGE].long()
            keys, values = cache.codec.unpack(cache.pages[own])
            assert torch.equal(keys.flatten(0, 1), cache.keys[layer, head, positions])
            assert torch.equal(values.flatten(0, 1), cache.values[layer, head, positions])
            held += own.tolist()
    assert sorted(held) == sorted(cache.geometry.pool_of(torch.tensor(targets["a"] + targets["b"])).tolist())


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("layers_at_once", [0, 1, 3, 5])
def test_layers_may_be_taken_a_few_at_a_time(policy: str, layers_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only memory is bounded, and one layer is the least that is taken: same tokens, same pages."""
    whole = compress(PagedCache(PROMPT, num_layers=5), words(policy, BUDGET))
    below_tail = PROMPT // PAGE * PAGE
    monkeypatch.setattr(kvcache.compressor, "_MAX_SCORES", layers_at_once * 2 * below_tail)
    parts = compress(PagedCache(PROMPT, num_layers=5), words(policy, BUDGET))
    assert positions_of(parts.kept) == positions_of(whole.kept)
    assert torch.equal(bits(parts.cache.pages), bits(whole.cache.pages))
    assert torch.equal(parts.rows(PROMPT)[0], whole.rows(PROMPT)[0])
    assert parts.report.layer_tokens == whole.report.layer_tokens


@pytest.mark.parametrize("policy", ALL)
def test_positions_are_forgotten_unless_asked_for(policy: str) -> None:
    asked = compress(PagedCache(PROMPT), words(policy, BUDGET))
    cache = PagedCache(PROMPT)
    tables = cache.compressor().tables
    compressor = Compressor(cache.geometry, cache.codec, cache.pages, tables, scale=SCALE, model=MODEL)
    plan = cache.start(compressor, words(policy, BUDGET))
    cache.feed(compressor, [PROMPT])
    cache.compact(compressor, plan)
    assert compressor.kept_positions("r") == []
    assert torch.equal(bits(cache.pages), bits(asked.cache.pages))


def test_report_may_be_read_late_and_twice() -> None:
    """Its numbers are those of the compaction, whatever came after."""
    cache = PagedCache(PROMPT)
    spoil(cache, 0, 0, 40)
    compressor = cache.compressor()
    plan = cache.start(compressor, words("l2norm", BUDGET))
    pending = compressor.compact(
        Compact("r", cache.blocks.tolist(), cache.free[: plan.kept_pages].tolist(), plan.prompt_len)
    )
    compressor.finish("r")
    cache.pages.fill_(float("nan"))
    report = pending.finish()
    assert report == pending.finish()
    assert (report.request_id, report.nan_scores) == ("r", 1) and 0 < report.seconds < 60
    assert report.layer_tokens == [float(plan.kept_tokens)] * 4


@pytest.mark.parametrize("policy", ALL)
def test_orders_that_do_not_fit_the_plan_are_errors(policy: str) -> None:
    cache = PagedCache(PROMPT)
    compressor = cache.compressor()
    plan = cache.start(compressor, words(policy, BUDGET))
    cache.feed(compressor, [PROMPT])
    source, target = cache.blocks.tolist(), cache.free[: plan.kept_pages].tolist()
    for blocks, pages, boundary in ((source[:-1], target, PROMPT), (source, target[:-1], PROMPT), (source, target, 1)):
        wrong = Compact("r", blocks, pages, boundary)
        with pytest.raises(RuntimeError, match="doesn't fit the request's plan"):
            compressor.compact(wrong)
    with pytest.raises(ValueError, match="no policy"):
        compressor.start(Start("r", {"policy": "none"}, RetentionPlan(PROMPT, PAGE, 3)))


def spoil(cache: PagedCache, layer: int, head: int, position: int) -> None:
    cache.keys[layer, head, position] = float("nan")
    cache.write(position, position + 1, cache.pages)


def test_token_whose_score_is_nan_stays_and_is_counted() -> None:
    cache = PagedCache(PROMPT)
    without = compress(PagedCache(PROMPT), words("l2norm", BUDGET))
    kept = {*without.kept[2][0].tolist(), *without.kept[2][1].tolist()}
    position = next(position for position in range(PROMPT) if position not in kept)
    spoil(cache, 2, 1, position)
    run = compress(cache, words("l2norm", BUDGET))
    assert run.report.nan_scores == 1
    assert position in run.kept[2][1].tolist()
    assert position not in run.kept[2][0].tolist()


WHOLE_HEAD = 160 - WINDOW
# One NaN key makes every vote of its head NaN; TOVA's votes are those of all heads, KeyDiff compares all keys, and
# column sums are those of all tokens.
# Expected Attention compares all keys behind the sinks; NaN attention is in every spectrogram.
NANS = {"streamingllm": 0, "random": 0, "l2norm": 1, "keydiff": 160, "tova": 2 * WHOLE_HEAD, "namm": 160}
NANS |= {"expectedattention": 160 - SINKS, "lra": 160, "lfa": 160}
NANS |= dict.fromkeys(SUMMED, 160)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("policy", ALL)
def test_nan_scores_of_a_whole_head_do_not_push_out_forced_tokens(policy: str, heads: str) -> None:
    """The sinks and the window stay all the same, in every head; competing heads get no less than that."""
    cache = PagedCache(160, num_kv_heads=2)
    spoil(cache, 1, 0, 40)
    run = compress(cache, words(policy, BUDGET, heads=heads))
    assert run.report.nan_scores == NANS.get(policy, WHOLE_HEAD)
    for _, _, positions in run.heads():
        forced = {*range(SINKS), *range(160 - run.recent(len(positions)), 160)}
        assert forced <= set(positions.tolist())
    nan, other = (len(positions) for positions in run.kept[1])
    layer = sum(len(positions) for positions in run.kept[1])
    assert layer == 2 * run.plan.kept_pages * PAGE or run.policy.layers.lengths_differ
    if heads == "adakv" and NANS.get(policy, WHOLE_HEAD) == WHOLE_HEAD:
        # Its NaNs win all that is free, and the other head has what it is sure of.
        assert nan > other
    elif heads == "equal":
        assert nan == other


@pytest.mark.parametrize("layers", LAYERS)
def test_nan_attention_of_a_layer_leaves_sums_and_forced_tokens_alone(layers: str) -> None:
    """A NaN head holds its mass in one token or none, whatever the allocator makes of it."""
    cache = PagedCache(160)
    spoil(cache, 1, 0, 40)
    run = compress(cache, words("snapkv", BUDGET, layers=layers))
    assert int(run.tables.counts[run.slot].sum()) == run.plan.kept_pages * 8
    forced = {*range(SINKS), *range(160 - WINDOW, 160)}
    assert all(forced <= set(positions.tolist()) for _, _, positions in run.heads())


@pytest.mark.parametrize(
    ("policy", "position", "counted"),
    [
        ("l2norm", 143, 1),
        ("l2norm", 144, 0),
        ("l2norm", 149, 0),
        ("snapkv", 40, 144),
        ("snapkv", 149, 144),
        ("pyramidkv", 146, 144),
        ("zigzagkv", 40, 144),
        ("adakv", 149, 144),
        ("criticalkv", 40, 144),
        ("tova", 40, 2 * 144),
        ("keydiff", 149, 144),
        ("h2o", 149, 144),
        ("observedattention", 40, 144),
        ("streamingllm", 40, 0),
    ],
)
def test_nan_scores_are_counted_below_the_tail(policy: str, position: int, counted: int) -> None:
    """The tail (144 ... 149 of 150) stays in any case. A NaN key there makes the window's votes NaN all the same."""
    cache = PagedCache(PROMPT)
    spoil(cache, 3, 1, position)
    assert compress(cache, words(policy, BUDGET)).report.nan_scores == counted


def test_nan_scores_of_a_window_that_reaches_below_the_tail_are_not_counted() -> None:
    """Six window tokens with a tail of two: four of them lie below it, and have no votes."""
    cache = PagedCache(146)
    spoil(cache, 1, 0, 40)
    assert compress(cache, words("snapkv", BUDGET)).report.nan_scores == 140


def test_values_of_zero_are_no_nan_scores() -> None:
    cache = PagedCache(160)
    cache.values[1, 0, 158] = 0
    cache.write(158, 159, cache.pages)
    assert compress(cache, words("criticalkv", BUDGET)).report.nan_scores == 0


def test_nan_value_is_one_nan_score() -> None:
    cache = PagedCache(160)
    cache.values[1, 0, 40] = float("nan")
    cache.write(40, 41, cache.pages)
    assert compress(cache, words("criticalkv", BUDGET)).report.nan_scores == 1


def test_random_depends_on_its_seed_and_differs_over_layers_and_heads() -> None:
    def kept(**arguments: int) -> list[list[list[int]]]:
        return positions_of(compress(PagedCache(PROMPT, seed=1), words("random", BUDGET, **arguments)).kept)

    assert kept(seed=3) == kept(seed=3)
    assert kept(seed=3) != kept(seed=4)
    assert kept() == kept(seed=0)
    sets = [tuple(positions) for heads in kept(seed=3) for positions in heads]
    assert len(set(sets)) == len(sets)


def test_random_keeps_every_place_alike() -> None:
    """Over many seeds no place is favoured: 61 of 141 free tokens stay, so each about 43 % of the time."""
    hits = torch.zeros(144)
    cache = PagedCache(PROMPT, num_layers=1, num_kv_heads=4)
    for seed in range(60):
        for positions in compress(cache, words("random", BUDGET, seed=seed)).kept[0]:
            hits[positions.cpu()] += 1 / 240
    assert (hits[:SINKS] > 0.999).all()
    assert hits[SINKS:].min() > 0.3 and hits[SINKS:].max() < 0.57
