"""DuoAttention: which heads stream, how many pages that makes, and what stays."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from kvcache.allocators.gates import streaming_heads
from kvcache.method import ModelShape
from kvcache.policies.base import Policy
from kvcache.registry import PolicyError, make_policy
from tests.kvcache.synthetic import PAGE, PagedCache, bits, compress, positions_of

SMALL = {"policy": "duoattention", "sinks": 3, "recent": 20}


def built(**arguments: Any) -> Policy:
    policy = make_policy({**SMALL, **arguments})
    assert policy is not None
    return policy


def random_gates(num_layers: int, num_kv_heads: int, seed: int) -> list[list[float]]:
    rng = random.Random(seed)
    return [[rng.random() for _ in range(num_kv_heads)] for _ in range(num_layers)]


@pytest.mark.parametrize(
    ("gates", "sparsity", "streaming"),
    [
        ([[0.1, 0.9], [0.5, 0.7]], 0.5, [[True, False], [True, False]]),
        ([[0.1, 0.9], [0.5, 0.7]], 0.25, [[True, False], [False, False]]),
        ([[0.1, 0.9], [0.5, 0.7]], 0.75, [[True, False], [True, True]]),
        ([[0.1, 0.9], [0.5, 0.7]], 0.0, [[False, False], [False, False]]),
        ([[0.1, 0.9], [0.5, 1.0]], 1.0, [[True, True], [True, True]]),
        ([[1, 1], [1, 1]], 0.5, [[False, False], [False, False]]),
        ([[0, 0], [0, 0]], 0.5, [[True, True], [True, True]]),
        ([[0, 0], [0, 1]], 0.25, [[True, True], [True, False]]),
        ([[0.2, 0.2], [0.2, 0.9]], 0.5, [[False, False], [False, False]]),  # equal gates fare alike
    ],
)
def test_the_lowest_gates_stream(gates: list[list[float]], sparsity: float, streaming: list[list[bool]]) -> None:
    assert streaming_heads(gates, sparsity).tolist() == streaming


@pytest.mark.parametrize("seed", range(20))
def test_pages_are_exact(seed: int) -> None:
    """Retrieval heads hold the prompt, streaming heads their forced tokens and less than a page more on average."""
    rng = random.Random(seed)
    shape = rng.randint(1, 7), rng.randint(1, 5)
    policy = built(gates=random_gates(*shape, seed), sparsity=rng.random(), recent=rng.randint(1, 70))
    prompt_len = rng.randint(1, 700)
    plan = policy.plan(prompt_len, PAGE)
    streaming = streaming_heads(policy.args.gates, policy.args.sparsity)
    least = max(1, -(-(3 + max(0, policy.args.recent - prompt_len % PAGE)) // PAGE))
    if plan is None:
        wished = torch.where(streaming, min(least, prompt_len // PAGE), prompt_len // PAGE)
        assert wished.sum() > (prompt_len // PAGE - 1) * streaming.numel() or prompt_len < PAGE
        return
    pages = policy.head_allocator.pages(plan, plan.min_pages(policy.args.recent))
    assert pages is not None and pages.shape == streaming.shape
    assert int(pages.sum()) == plan.kept_pages * streaming.numel()
    assert (pages[~streaming] == plan.full_pages).all()
    assert (pages[streaming] >= least).all()
    assert int((pages[streaming] - least).sum()) < streaming.numel()


def test_gates_of_one_keep_everything() -> None:
    assert built(gates=[[1, 1]] * 4).plan(1000, PAGE) is None
    assert built(gates=[[1.0, 1.0]] * 4, sparsity=0.9).plan(1000, PAGE) is None


@pytest.mark.parametrize("prompt_len", [150, 160, 173])
def test_gates_of_zero_keep_what_streamingllm_keeps(prompt_len: int) -> None:
    duo = compress(PagedCache(prompt_len), {**SMALL, "recent": 50, "gates": [[0, 0]] * 4})
    budget = duo.plan.kept_tokens
    streaming = compress(PagedCache(prompt_len), {"policy": "streamingllm", "sinks": 3, "budget": budget})
    assert positions_of(duo.kept) == positions_of(streaming.kept)
    assert budget >= 53 and duo.plan.kept_pages == duo.plan.min_pages(50)


@pytest.mark.parametrize("prompt_len", [150, 160])
def test_each_head_keeps_what_its_gate_says(prompt_len: int) -> None:
    gates = [[0.9, 0.1], [0.8, 0.7], [0.2, 0.3], [0.4, 0.6]]
    cache = PagedCache(prompt_len)
    run = compress(cache, {**SMALL, "gates": gates})
    below_tail = run.plan.full_pages * PAGE
    for layer, head, positions in run.heads():
        kept = positions.tolist()
        if gates[layer][head] > 0.5:
            assert kept == list(range(below_tail))
        else:
            assert {0, 1, 2, *range(prompt_len - 20, below_tail)} <= set(kept)
            assert kept == [*range(3), *range(below_tail - len(kept) + 3, below_tail)]
        keys, values = cache.codec.unpack(cache.pages[run.compacted(layer, head)])
        assert torch.equal(keys.flatten(0, 1), cache.keys[layer, head, positions])
        assert torch.equal(values.flatten(0, 1), cache.values[layer, head, positions])
    target = run.cache.geometry.pool_of(run.cache.free[: run.plan.kept_pages])
    changed = (bits(cache.pages) != bits(run.before)).any(1).nonzero().flatten()
    assert changed.tolist() == target.sort().values.tolist()


def test_prompts_that_fit_are_left_alone() -> None:
    policy = built(gates=[[0, 0]] * 4)
    assert all(policy.plan(n, PAGE) is None for n in range(1, 24))
    assert policy.plan(64, PAGE) is not None


def test_without_gates_nothing_is_dropped() -> None:
    """The server refuses such a request; the engine must not fail on it."""
    assert built().plan(10_000, PAGE) is None


@pytest.mark.parametrize(
    ("gates", "problem"),
    [
        ([[0.5, 1.5]], "less than or equal to 1"),
        ([[0.5, -0.1]], "greater than or equal to 0"),
        ([[0.5, float("nan")]], "or equal to"),
        ([[0.5], [0.5, 0.5]], "the same number of gates"),
        ([[]], "at least 1 item"),
        ("gates.tsv", "valid list"),
        ([["0.5"]], "valid number"),
        ([[True]], "valid number"),
    ],
)
def test_gates_that_are_no_table_are_refused(gates: Any, problem: str) -> None:
    with pytest.raises(PolicyError, match=problem) as caught:
        make_policy({"policy": "duoattention", "gates": gates})
    assert caught.value.field == "kv_cache.gates"
    assert caught.value.allowed == "a list, each item a list, each item number >= 0 and <= 1"


@pytest.mark.parametrize(
    ("gates", "model", "field", "problem"),
    [
        ([], None, "kv_cache.gates", "are missing"),
        ([], ModelShape(2, 3), "kv_cache.gates", "--kv-head-gates FILE"),
        ([[0.5] * 3], ModelShape(2, 3), "kv_cache.gates", "1 layers of 3 KV heads"),
        ([[0.5] * 2] * 2, ModelShape(2, 3), "kv_cache.gates", "2 layers of 2 KV heads"),
        ([[0.5] * 3] * 2, ModelShape(2, 3, tensor_parallel=2), "kv_cache.policy", "tensor parallel"),
    ],
)
def test_gates_that_do_not_fit_the_model_are_refused(
    gates: list[list[float]], model: ModelShape | None, field: str, problem: str
) -> None:
    with pytest.raises(PolicyError, match=problem) as caught:
        built(gates=gates).check_model(model)
    assert caught.value.field == field
    built(gates=[[0.5] * 3] * 2).check_model(ModelShape(2, 3))
    built(gates=[[0.5] * 3] * 2).check_model(None)


@pytest.mark.parametrize(("field", "part"), [("layers", "zigzag"), ("heads", "equal"), ("heads", "adakv")])
def test_other_allocators_are_refused(field: str, part: str) -> None:
    with pytest.raises(PolicyError, match=f"kv_cache.{field}: duoattention takes no other"):
        make_policy({"policy": "duoattention", field: part})
    assert make_policy({"policy": "duoattention", "layers": "uniform", "heads": "gates"}) is not None
    with pytest.raises(PolicyError, match="there is no such allocator: 'gates'"):
        make_policy({"policy": "snapkv", "heads": "gates"})


def test_a_budget_is_refused() -> None:
    with pytest.raises(PolicyError, match="has no such argument") as caught:
        make_policy({"policy": "duoattention", "budget": 512})
    assert caught.value.allowed == "gates, sparsity, sinks, suffix, recent, report"
