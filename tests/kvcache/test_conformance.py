"""One matrix for every policy: what stays, where it lies, and that attention over it is right."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from kvcache.registry import make_policy, policies
from tests.kvcache.brute_force import kept, pyramid_tokens, shared, snapkv_votes
from tests.kvcache.synthetic import PAGE, SCALE, SINKS, WINDOW, PagedCache, Run, bits, compress, words

BUDGET = 70
NEW = 2 * PAGE + 5
BY_HAND = sorted(set(policies()) - {"random"})


@pytest.fixture(scope="module", params=[(9, 3), (4, 4), (8, 2)], ids=lambda heads: f"{heads[0]}q{heads[1]}kv")
def heads(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


@pytest.fixture(scope="module", params=[71, 150, 159, 160])
def prompt_len(request: pytest.FixtureRequest) -> int:
    """Just above the budget; tails of 7, 6 and 15 tokens, and none."""
    return request.param


@pytest.fixture(scope="module", params=sorted(policies()))
def policy(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def run(policy: str, heads: tuple[int, int], prompt_len: int) -> Run:
    cache = PagedCache(
        prompt_len, num_heads=heads[0], num_kv_heads=heads[1], new=NEW, block_major=prompt_len % 2 == 0, seed=prompt_len
    )
    return compress(cache, words(policy, BUDGET))


def recent_of(policy: str) -> int:
    built = make_policy(words(policy, BUDGET))
    assert built is not None
    return built.recent


def test_kept_positions_are_unique_ascending_and_below_the_tail(run: Run) -> None:
    below_tail = run.plan.full_pages * PAGE
    for _, _, positions in run.heads():
        steps = positions.diff()
        assert (steps > 0).all()
        assert positions[0] >= 0 and positions[-1] < below_tail


def test_sinks_and_recent_tokens_stay(run: Run, policy: str) -> None:
    recent, below_tail = recent_of(policy), run.plan.full_pages * PAGE
    forced = {*range(SINKS), *range(min(run.plan.prompt_len - recent, below_tail), below_tail)}
    assert recent in (0, WINDOW)
    for _, _, positions in run.heads():
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


def test_only_policies_that_say_so_have_layers_of_different_length(run: Run, policy: str) -> None:
    differ = len(set(run.report.layer_tokens)) > 1
    assert differ == (policies()[policy].layer_lengths_differ and run.plan.prompt_len > 2 * BUDGET)


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
            paged = attend(queries, keys.flatten(0, 1)[:slots], values.flatten(0, 1)[:slots], causal)

            visible = torch.arange(length) <= torch.arange(first, length)[:, None]
            evicted = torch.ones(plan.full_pages * PAGE, dtype=torch.bool)
            evicted[positions] = False
            visible[:, : len(evicted)] &= ~evicted
            dense = attend(queries, cache.keys[layer, head, :length], cache.values[layer, head, :length], visible)
            torch.testing.assert_close(paged, dense, atol=1e-5, rtol=0)


def scores_by_hand(policy: str, cache: PagedCache, layer: int, head: int, **arguments: str | int) -> list[float]:
    """For tokens before the window; from the papers."""
    n, keys = cache.prompt_len, cache.keys[layer, head].tolist()[: cache.prompt_len]
    if policy == "streamingllm":
        return [float(position) for position in range(n)]
    if policy == "l2norm":
        return [-(sum(x * x for x in key) ** 0.5) for key in keys]
    assert policy in ("snapkv", "pyramidkv"), f"write the scores of {policy} out by hand here"
    group = cache.num_heads // cache.geometry.num_kv_heads
    queries = cache.queries[layer, n - WINDOW : n, head * group : (head + 1) * group].transpose(0, 1).tolist()
    settings = {"pooling": "max", "kernel": 21, "group_reduce": "mean", "group_stage": "probabilities", **arguments}
    return snapkv_votes(queries, keys, SCALE, **settings)  # type: ignore[arg-type]


def pages_by_hand(policy: str, run: Run) -> list[int]:
    plan, layers = run.plan, run.cache.geometry.num_layers
    if policy != "pyramidkv":
        return [plan.kept_pages] * layers
    tokens = pyramid_tokens(layers, plan.kept_tokens, plan.prompt_len, WINDOW, 20)
    weights = [Fraction(amount - plan.tail) / PAGE for amount in tokens]
    forced_pages = max(1, -(-(SINKS + max(0, WINDOW - plan.tail)) // PAGE))
    return shared(weights, plan.kept_pages * layers, forced_pages, plan.full_pages)[1]


def assert_kept_by_hand(policy: str, run: Run, **arguments: str | int) -> None:
    plan, pages = run.plan, pages_by_hand(policy, run)
    for layer, head, positions in run.heads():
        scores = scores_by_hand(policy, run.cache, layer, head, **arguments)
        below_tail = plan.full_pages * PAGE
        expected = kept(scores, pages[layer] * PAGE, SINKS, recent_of(policy), plan.prompt_len, below_tail)
        assert positions.tolist() == expected, f"layer {layer}, KV head {head}"


@pytest.mark.parametrize("policy", BY_HAND, scope="module")
def test_kept_sets_equal_those_by_hand(run: Run, policy: str) -> None:
    assert_kept_by_hand(policy, run)


@pytest.mark.parametrize("group_stage", ["probabilities", "logits"])
@pytest.mark.parametrize("group_reduce", ["mean", "max", "sum"])
@pytest.mark.parametrize("kernel", [1, 5, 7])
@pytest.mark.parametrize("pooling", ["avg", "max", "none"])
def test_snapkv_arguments_equal_those_by_hand(pooling: str, kernel: int, group_reduce: str, group_stage: str) -> None:
    arguments: dict[str, Any] = {
        "pooling": pooling,
        "kernel": kernel,
        "group_reduce": group_reduce,
        "group_stage": group_stage,
    }
    cache = PagedCache(107, num_heads=6, num_kv_heads=2, num_layers=2, seed=kernel)
    assert_kept_by_hand("snapkv", compress(cache, words("snapkv", 60, **arguments)), **arguments)


@pytest.mark.parametrize("policy", BY_HAND)
def test_kept_sets_of_one_long_prompt_equal_those_by_hand(policy: str) -> None:
    """The default forced parts and a page budget that differs a lot over layers."""
    cache = PagedCache(333, num_heads=2, num_kv_heads=1, num_layers=6, seed=5)
    run = compress(cache, words(policy, "40%"))
    assert run.plan.kept_tokens == 333 % PAGE + PAGE * ((134 - 333 % PAGE) // PAGE)
    assert_kept_by_hand(policy, run)
