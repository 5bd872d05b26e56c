"""One matrix for every policy: what stays, where it lies, and that attention over it is right."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch

from kvcache.allocators.base import LayerAllocator
from kvcache.evidence import LayerEvidence
from kvcache.policies.criticalkv import CriticalKV
from kvcache.policies.snapkv import SnapKV
from kvcache.registry import HEADS, LAYERS, PARTS
from tests.kvcache.brute_force import (
    ada_counts,
    by_age,
    column_sums,
    critical_scores,
    d2o_tokens,
    d2o_variance,
    expected_attention,
    future_moments,
    kept,
    keydiff_scores,
    probabilities_before,
    pyramid_tokens,
    rkv_scores,
    shared,
    snapkv_votes,
    tokens_holding,
    tova_votes,
    uses,
    zigzag_tokens,
)
from tests.kvcache.synthetic import (
    BUDGETED,
    PAGE,
    ROTARY_BASE,
    ROTARY_DIM,
    SCALE,
    SINKS,
    WINDOW,
    PagedCache,
    Run,
    bits,
    compress,
    words,
)

BUDGET = 70
NEW = 2 * PAGE + 5
BY_HAND = sorted(set(BUDGETED) - {"random", "namm"})
# Merged tokens are no longer those of the prompt: tests/kvcache/test_merging.py.
WHOLE_TOKENS = {"d2o": {"merge": "none"}}
SEEDS = {"rkv": 2000}
"""Other random numbers where scores are so close together that rounding would choose."""


@pytest.fixture(scope="module", params=[(9, 3), (4, 4), (8, 2)], ids=lambda heads: f"{heads[0]}q{heads[1]}kv")
def heads(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


@pytest.fixture(scope="module", params=[71, 150, 159, 160])
def prompt_len(request: pytest.FixtureRequest) -> int:
    """Just above the budget; tails of 7, 6 and 15 tokens, and none."""
    return request.param


@pytest.fixture(scope="module", params=BUDGETED)
def policy(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def run(policy: str, heads: tuple[int, int], prompt_len: int) -> Run:
    cache = PagedCache(
        prompt_len,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        new=NEW,
        block_major=prompt_len % 2 == 0,
        uneven=True,
        seed=prompt_len + SEEDS.get(policy, 0),
    )
    return compress(cache, words(policy, BUDGET, **WHOLE_TOKENS.get(policy, {})))


def test_kept_positions_are_unique_ascending_and_below_the_tail(run: Run) -> None:
    below_tail = run.plan.full_pages * PAGE
    for _, _, positions in run.heads():
        steps = positions.diff()
        assert (steps > 0).all()
        assert positions[0] >= 0 and positions[-1] < below_tail


def test_sinks_and_recent_tokens_stay(run: Run) -> None:
    below_tail = run.plan.full_pages * PAGE
    for _, _, positions in run.heads():
        recent, tokens = run.recent(len(positions)), len(positions) + run.plan.tail
        assert recent == {"streamingllm": 0, "h2o": tokens // 2, "d2o": tokens // 2}.get(run.policy.name, WINDOW)
        forced = {*range(SINKS), *range(min(run.plan.prompt_len - recent, below_tail), below_tail)}
        assert forced <= set(positions.tolist())


def test_counts_are_exact(run: Run) -> None:
    plan, geometry = run.plan, run.cache.geometry
    counts = run.tables.counts[run.slot]
    assert counts.sum() == plan.kept_pages * geometry.num_layers * geometry.num_kv_heads
    for layer, head, positions in run.heads():
        assert len(positions) == counts[layer, head] * PAGE == len(run.compacted(layer, head)) * PAGE
    assert len(run.report.layer_tokens) == geometry.num_layers
    for layer, tokens in enumerate(run.report.layer_tokens):
        assert tokens == sum(len(positions) for positions in run.kept[layer]) / geometry.num_kv_heads + plan.tail
    assert sum(run.report.layer_tokens) / geometry.num_layers == pytest.approx(plan.kept_tokens)
    assert BUDGET - PAGE < plan.kept_tokens <= BUDGET
    assert run.report.nan_scores == 0


def test_only_policies_that_say_so_have_layers_of_different_length(run: Run) -> None:
    differ = len(set(run.report.layer_tokens)) > 1
    long = run.plan.prompt_len > 2 * BUDGET
    assert run.policy.describe()["layer_lengths_differ"] == run.policy.layers.lengths_differ
    if run.policy.layers.name == "d2o":  # shares differ by some percent, often less than a page
        return
    if long or run.policy.layers.statistic is LayerAllocator.statistic:  # attention may differ in short prompts too
        assert differ == (run.policy.layers.lengths_differ and long)


def test_only_policies_that_say_so_have_heads_of_different_length(run: Run) -> None:
    """Each layer's total is what it would be with equal heads all the same."""
    counts = run.tables.counts[run.slot]
    assert (counts.sum(1) % run.cache.geometry.num_kv_heads == 0).all()
    differ = bool((counts != counts[:, :1]).any())
    if run.plan.prompt_len > 2 * BUDGET or not run.policy.heads.needs_scores:
        assert differ == run.policy.heads.needs_scores


def test_compacted_pages_hold_exactly_the_kept_tokens(run: Run) -> None:
    cache = run.cache
    for layer, head, positions in run.heads():
        keys, values = cache.codec.unpack(cache.pages[run.compacted(layer, head)])
        assert torch.equal(keys.flatten(0, 1), cache.keys[layer, head, positions])
        assert torch.equal(values.flatten(0, 1), cache.values[layer, head, positions])


def test_nothing_else_is_written(run: Run) -> None:
    target = run.cache.geometry.pool_of(run.cache.free[: run.plan.kept_pages])
    changed = (bits(run.cache.pages) != bits(run.before)).any(1).nonzero().flatten()
    assert changed.tolist() == target.sort().values.tolist()
    held = torch.cat([run.compacted(layer, head) for layer, head, _ in run.heads()])
    assert held.sort().values.tolist() == target.sort().values.tolist()


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Queries [q, G, d] of one KV head over [n, d]; visible [q, n]."""
    logits = torch.einsum("qgd,nd->gqn", queries, keys) * SCALE
    return (logits.masked_fill(~visible, float("-inf")).softmax(-1) @ values).transpose(0, 1)


def test_attention_over_the_pages_is_dense_attention_without_the_evicted(run: Run) -> None:
    cache, geometry, plan = run.cache, run.cache.geometry, run.plan
    pages, group = cache.pages.clone(), cache.num_heads // geometry.num_kv_heads
    length = plan.prompt_len
    for step in (1, 5, NEW - 6):
        cache.write(length, length + step, pages)
        first, length = length, length + step
        rows, physical = run.rows(length)
        for layer, head, positions in run.heads():
            queries = cache.queries[layer, first:length, head * group : (head + 1) * group]
            slots = int(physical[layer, head])
            keys, values = cache.codec.unpack(pages[rows[layer, head, : -(-slots // PAGE)].long()])
            causal = torch.arange(slots) <= torch.arange(slots - step, slots)[:, None]
            causal = causal.to(cache.device)
            paged = attend(queries, keys.flatten(0, 1)[:slots], values.flatten(0, 1)[:slots], causal)

            visible = torch.arange(length) <= torch.arange(first, length)[:, None]
            evicted = torch.ones(plan.full_pages * PAGE, dtype=torch.bool)
            evicted[positions.cpu()] = False
            visible[:, : len(evicted)] &= ~evicted
            every = cache.keys[layer, head, :length], cache.values[layer, head, :length]
            dense = attend(queries, *every, visible.to(cache.device))
            torch.testing.assert_close(paged, dense, atol=1e-5, rtol=0)


def scores_by_hand(run: Run, layer: int) -> list[list[float]]:
    """Of every KV head, for tokens before the window at least; from the papers."""
    cache, policy = run.cache, run.policy
    n, group = cache.prompt_len, cache.num_heads // cache.geometry.num_kv_heads
    keys, values = (part[layer, :, :n].tolist() for part in (cache.keys, cache.values))
    if policy.name == "streamingllm":
        return [[float(position) for position in range(n)] for _ in keys]
    if policy.name == "l2norm":
        return [[-(sum(x * x for x in key) ** 0.5) for key in head] for head in keys]
    if policy.name == "keydiff":
        return [keydiff_scores(head) for head in keys]
    if policy.name == "random":  # any numbers will do
        evidence = LayerEvidence(layer, cache.keys[layer, :, :n], cache.values[layer, :, :n], None, SCALE)
        return policy.scores(evidence).tolist()
    if policy.name in ("h2o", "d2o"):
        return sums_by_hand(run, layer)
    if policy.name == "observedattention":
        return [[x / (n - position) for position, x in enumerate(head)] for head in sums_by_hand(run, layer)]
    if policy.name == "tova":
        return [tova_votes(attention_by_hand(run, layer))] * len(keys)
    if policy.name == "rkv":
        asked, settings = window_queries(run, layer), policy.args.model_dump(include={"kernel", "mix", "threshold"})
        return [rkv_scores(asked[i * group : (i + 1) * group], head, SCALE, **settings) for i, head in enumerate(keys)]
    if policy.name == "expectedattention":
        queries, args = cache.queries[layer, :n].transpose(0, 1).tolist(), policy.args
        moments = [future_moments(head, 4, args.future, ROTARY_DIM, ROTARY_BASE) for head in queries]
        weights = values if args.weighting == "values" else [[[1.0] for _ in head] for head in values]
        return [
            expected_attention(moments[i * group : (i + 1) * group], head, own, SCALE, SINKS, args.epsilon)
            for i, (head, own) in enumerate(zip(keys, weights, strict=True))
        ]
    if policy.name in ("lra", "lfa"):
        asked = window_queries(run, layer)
        used = [uses(asked[i * group : (i + 1) * group], head, SCALE, policy.args.top) for i, head in enumerate(keys)]
        if policy.name == "lfa":
            return by_age([[len(times) for times in head] for head in used])
        return by_age([[max([position, *times]) for position, times in enumerate(head)] for head in used])
    assert isinstance(policy, SnapKV), f"write the scores of {policy.name} out by hand here"
    queries = window_queries(run, layer)
    settings = policy.args.model_dump(include={"pooling", "kernel", "group_reduce", "group_stage", "window_reduce"})
    votes = [
        snapkv_votes(queries[head * group : (head + 1) * group], keys[head], SCALE, **settings)
        for head in range(len(keys))
    ]
    if isinstance(policy, CriticalKV):
        sure = math.floor(policy.args.budget.resolve(n) * Fraction(str(policy.args.first_stage)))
        padded = [head + [math.inf] * (n - len(head)) for head in votes]
        return [critical_scores(head, own, sure, policy.args.epsilon) for head, own in zip(padded, values, strict=True)]
    return votes


def window_queries(run: Run, layer: int) -> list[list[list[float]]]:
    """[num_heads][w][d]."""
    n = run.cache.prompt_len
    queries = run.cache.queries[layer, n - run.policy.query_window : n].transpose(0, 1)
    return queries.tolist()


def attention_by_hand(run: Run, layer: int) -> list[list[float]]:
    """Of every query head, for the tokens before the window."""
    cache, rows = run.cache, []
    group = cache.num_heads // cache.geometry.num_kv_heads
    queries = window_queries(run, layer)
    for head, keys in enumerate(cache.keys[layer, :, : cache.prompt_len].tolist()):
        rows += probabilities_before(queries[head * group : (head + 1) * group], keys, SCALE)
    return rows


def sums_by_hand(run: Run, layer: int) -> list[list[float]]:
    """Of every KV head."""
    cache = run.cache
    n, group = cache.prompt_len, cache.num_heads // cache.geometry.num_kv_heads
    queries = cache.queries[layer, :n].transpose(0, 1).tolist()
    return [
        column_sums(queries[head * group : (head + 1) * group], keys, SCALE)
        for head, keys in enumerate(cache.keys[layer, :, :n].tolist())
    ]


def layer_tokens_by_hand(run: Run) -> list[Fraction]:
    plan, num_layers, allocator = run.plan, run.cache.geometry.num_layers, run.policy.layers.name
    budget = plan.kept_tokens
    if allocator == "uniform":
        return [Fraction(budget)] * num_layers
    if allocator == "pyramid":
        return pyramid_tokens(num_layers, budget, plan.prompt_len, run.policy.recent, run.policy.args.beta)
    if allocator == "d2o":
        v = [d2o_variance(sums_by_hand(run, layer)) for layer in range(num_layers)]
        args = run.policy.args
        return d2o_tokens(v, budget, plan.prompt_len, args.whole_first, args.whole_last)
    attention = [attention_by_hand(run, layer) for layer in range(num_layers)]
    if allocator == "zigzag":
        mass, bound = run.policy.args.mass, Fraction(str(run.policy.args.bound)) * budget
        lmba = [Fraction(sum(tokens_holding(head, mass) for head in heads), len(heads)) for heads in attention]
        return zigzag_tokens(lmba, budget, bound)
    assert allocator == "zipvl", f"write the shares of {allocator} out by hand here"
    fewest = [tokens_holding(tova_votes(heads), run.policy.args.tau) for heads in attention]
    return [Fraction(budget * num_layers * count, sum(fewest)) for count in fewest]


def pages_by_hand(run: Run, scores: list[list[list[float]]]) -> list[list[int]]:
    """By layer and KV head."""
    plan, geometry = run.plan, run.cache.geometry
    below_tail, recent = plan.full_pages * PAGE, run.policy.recent
    forced_pages = max(1, -(-(SINKS + max(0, recent - plan.tail)) // PAGE))
    weights = [(tokens - plan.tail) / PAGE for tokens in layer_tokens_by_hand(run)]
    pages = shared(weights, plan.kept_pages * geometry.num_layers, forced_pages, plan.full_pages)[1]
    if run.policy.heads.name == "equal":
        return [[count] * geometry.num_kv_heads for count in pages]
    assert run.policy.heads.name == "adakv", f"write the shares of {run.policy.heads.name} out by hand here"
    floor, result = Fraction(str(run.policy.args.floor)), []
    for count, heads in zip(pages, scores, strict=True):
        forced = [
            [math.inf if i < SINKS or i >= plan.prompt_len - recent else head[i] for i in range(below_tail)]
            for head in heads
        ]
        wishes = [Fraction(tokens, PAGE) for tokens in ada_counts(forced, count * PAGE, floor)]
        result.append(shared(wishes, count * geometry.num_kv_heads, forced_pages, plan.full_pages)[1])
    return result


def assert_kept_by_hand(run: Run) -> None:
    plan = run.plan
    scores = [scores_by_hand(run, layer) for layer in range(run.cache.geometry.num_layers)]
    pages = pages_by_hand(run, scores)
    assert run.tables.counts[run.slot].tolist() == pages
    for layer, head, positions in run.heads():
        count, below_tail = pages[layer][head] * PAGE, plan.full_pages * PAGE
        expected = kept(scores[layer][head], count, SINKS, run.recent(count), plan.prompt_len, below_tail)
        assert positions.tolist() == expected, f"layer {layer}, KV head {head}"


@pytest.mark.parametrize("policy", BY_HAND, scope="module")
def test_kept_sets_equal_those_by_hand(run: Run, policy: str) -> None:
    assert_kept_by_hand(run)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("policy", ["snapkv", "tova", "l2norm", "keydiff", "h2o", "random"])
def test_kept_sets_of_combinations_equal_those_by_hand(policy: str, layers: str, heads: str) -> None:
    cache = PagedCache(171, num_heads=6, num_kv_heads=3, num_layers=3, uneven=True, seed=1)
    small: dict[str, dict[str, Any]] = {"zipvl": {"tau": 0.7}, "d2o": {"whole_first": 1}}
    run = compress(cache, words(policy, 75, layers=layers, heads=heads, **small.get(layers, {})))
    assert (run.policy.name, run.policy.layers.name, run.policy.heads.name) == (policy, layers, heads)
    assert_kept_by_hand(run)
    counts = run.tables.counts[run.slot]
    assert (len(set(counts.sum(1).tolist())) > 1) == (layers != "uniform")
    # TOVA's scores are those of all heads, so none has a claim on more; random numbers give a page more or less, and
    # sums over all queries are largest for the first tokens of any head.
    assert policy in ("random", "h2o") or bool((counts != counts[:, :1]).any()) == (
        heads == "adakv" and policy != "tova"
    )


@pytest.mark.parametrize(
    ("policy", "arguments"),
    [
        ("zigzagkv", {"mass": 0.5, "bound": 0.0}),
        ("zigzagkv", {"mass": 0.7, "bound": 0.25}),
        ("zigzagkv", {"bound": 1.0}),
        ("zigzagkv", {"group_stage": "logits", "heads": "adakv"}),
        ("adakv", {"floor": 0.0}),
        ("adakv", {"floor": 0.65}),
        ("adakv", {"floor": 1.0}),
        ("adakv", {"layers": "pyramid", "beta": 5}),
        ("pyramidkv", {"heads": "adakv", "pooling": "avg", "kernel": 5}),
        ("pyramidkv", {"layers": "zipvl", "tau": 0.5}),
        ("l2norm", {"layers": "zigzag", "window": 9, "recent": 2}),
        ("keydiff", {"layers": "zipvl", "tau": 0.8, "window": 20, "recent": 0, "heads": "adakv"}),
        ("streamingllm", {"layers": "zigzag", "mass": 0.6, "heads": "adakv"}),
        ("streamingllm", {"layers": "pyramid"}),
        ("tova", {"window": 1}),
        ("snapkv", {"layers": "d2o", "whole_first": 1, "whole_last": 1}),
        ("h2o", {"recent_share": 0.0}),
        ("h2o", {"recent_share": 1.0}),
        ("h2o", {"recent_share": 0.29, "layers": "pyramid"}),
        ("h2o", {"layers": "zigzag", "heads": "adakv"}),
        ("observedattention", {"recent": 0}),
        ("d2o", {"whole_first": 2, "whole_last": 1}),
        ("d2o", {"whole_last": 1, "recent_share": 0.25, "heads": "adakv"}),
        ("criticalkv", {"pooling": "none"}),
        ("criticalkv", {"pooling": "none", "first_stage": 0.0}),
        ("criticalkv", {"pooling": "none", "first_stage": 1.0, "group_reduce": "mean"}),
        ("criticalkv", {"pooling": "none", "first_stage": 0.3, "epsilon": 0.02}),
        ("criticalkv", {"pooling": "none", "epsilon": 0.0, "layers": "zigzag"}),
        ("rkv", {"mix": 0.0}),
        ("rkv", {"mix": 1.0, "kernel": 1}),
        ("rkv", {"mix": 0.4, "threshold": -0.2, "window": 20, "heads": "adakv"}),
        ("rkv", {"threshold": 1.0, "layers": "zigzag"}),
        ("expectedattention", {"future": 1, "epsilon": 0.0}),
        ("expectedattention", {"future": 40, "epsilon": 0.01, "weighting": "none", "layers": "zigzag"}),
        ("expectedattention", {"recent": 0, "heads": "adakv", "floor": 0.5}),
    ],
)
def test_arguments_of_parts_equal_those_by_hand(policy: str, arguments: dict[str, Any]) -> None:
    cache = PagedCache(171, num_heads=6, num_kv_heads=3, num_layers=3, uneven=True, seed=2)
    run = compress(cache, words(policy, "45%", **arguments))
    assert run.policy.args.model_dump(mode="json").items() >= {
        (key, value) for key, value in arguments.items() if key not in PARTS
    }
    assert_kept_by_hand(run)


@pytest.mark.parametrize("window_reduce", ["mean", "max"])
@pytest.mark.parametrize("group_stage", ["probabilities", "logits"])
@pytest.mark.parametrize("group_reduce", ["mean", "max", "sum"])
@pytest.mark.parametrize("kernel", [1, 5, 7])
@pytest.mark.parametrize("pooling", ["avg", "max", "none"])
def test_snapkv_arguments_equal_those_by_hand(
    pooling: str, kernel: int, group_reduce: str, group_stage: str, window_reduce: str
) -> None:
    arguments: dict[str, Any] = {
        "pooling": pooling,
        "window_reduce": window_reduce,
        "kernel": kernel,
        "group_reduce": group_reduce,
        "group_stage": group_stage,
    }
    cache = PagedCache(107, num_heads=6, num_kv_heads=2, num_layers=2, seed=kernel)
    assert_kept_by_hand(compress(cache, words("snapkv", 60, **arguments)))


@pytest.mark.parametrize("policy", BY_HAND)
def test_kept_sets_of_one_long_prompt_equal_those_by_hand(policy: str) -> None:
    """The default forced parts and a page budget that differs a lot over layers."""
    cache = PagedCache(333, num_heads=4, num_kv_heads=2, num_layers=6, uneven=True, seed=5 + SEEDS.get(policy, 0))
    run = compress(cache, words(policy, "40%"))
    assert run.plan.kept_tokens == 333 % PAGE + PAGE * ((134 - 333 % PAGE) // PAGE)
    assert_kept_by_hand(run)
