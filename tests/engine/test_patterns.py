"""Patterns in the engine: dense where they have to be, what transformers says with the same plans where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attention_plugins.prefill.attention import run
from attention_plugins.prefill.base import Chunk
from attention_plugins.prefill.registry import make_pattern, patterns
from tests.engine.harness import PAGE, Engine, Job
from tests.engine.test_answers import prompt_of
from tests.reference import Attends, Reference

pytestmark = pytest.mark.engine

SPARSE: list[dict[str, Any]] = [
    {"pattern": "xattention", "threshold": 0.5},
    {"pattern": "flexprefill", "gamma": 0.4, "min_budget": 1},
    {"pattern": "minference", "vertical": 40, "slash": 60},
    {"pattern": "anchor", "theta": -1.0, "step": 1},
    {"pattern": "hip", "sinks": 32, "window": 256, "tokens": 128, "dense_layers": 1, "second_tokens": 128,
     "first_tokens": 256},
    {"pattern": "zipvl", "tau": 0.3, "window": 64},
    {"pattern": "streaming", "sinks": 32, "window": 64},
    {"pattern": "delta", "gamma": 48, "base": {"pattern": "streaming", "sinks": 32, "window": 64, "min_context": 0}},
    {"pattern": "power", "window": 1},
    {"pattern": "strided", "local": 2, "stride": 4},
    {"pattern": "bigbird"},
]  # fmt: skip
DENSE: list[dict[str, Any]] = [
    {"pattern": "xattention", "threshold": 1.0},
    {"pattern": "flexprefill", "gamma": 1.0},
    {"pattern": "zipvl", "tau": 1.0},
    {"pattern": "streaming", "window": 4096},
    {"pattern": "delta", "gamma": 1, "base": {"pattern": "streaming", "sinks": 32, "window": 64, "min_context": 0}},
    {"pattern": "power", "window": 16},
]


def asking(words: dict[str, Any]) -> dict[str, Any]:
    return words if words["pattern"] == "delta" else {"min_context": 0, **words}


def exact(words: dict[str, Any]) -> bool:
    pattern = make_pattern(asking(words))
    assert pattern is not None
    return pattern.chunk_exact


def named(cases: list[dict[str, Any]]) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("words", cases, ids=lambda words: words["pattern"])


def planned(words: dict[str, Any], prompt_len: int) -> Attends:
    """What the pattern makes of a prompt, in plain torch."""
    pattern = make_pattern(asking(words))
    carries: dict[int, torch.Tensor | None] = {}
    assert pattern is not None

    def attends(layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        chunk = Chunk(queries, keys, queries.shape[-1] ** -0.5, PAGE, layer, prompt_len)
        if not pattern.applies(layer, chunk.k_len):
            return run(make_pattern({"pattern": "streaming", "window": 1 << 20, "min_context": 0}), chunk, values)[0]  # type: ignore[arg-type]
        out, carries[layer] = run(pattern, chunk, values, carries.get(layer))
        return out

    return attends


def test_every_pattern_is_tried() -> None:
    assert {words["pattern"] for words in SPARSE} == set(patterns())


@named(DENSE)
def test_computing_everything_is_dense_attention(engine: Engine, words: dict[str, Any]) -> None:
    prompt = prompt_of(900)
    (dense,) = engine.run([Job(prompt, max_tokens=20)])
    (job,) = engine.run([Job(prompt, prefill=asking(words), max_tokens=20)])
    assert job.tokens == dense.tokens
    if words["pattern"] != "delta":
        assert job.prefilled["density"] == {"mean": 1.0, "by_layer": [1.0] * 3}


@pytest.mark.parametrize("length, chunk", [(1700, None), (1500, 384), (1641, 300)])
@named(SPARSE)
def test_answers_are_transformers_with_the_same_plans(
    engine: Engine, reference: Reference, words: dict[str, Any], length: int, chunk: int | None
) -> None:
    """Chunks end at multiples of 128 tokens, whatever vLLM would have scheduled."""
    engine.set_chunk(chunk)
    (job,) = engine.run([Job(prompt_of(length), prefill=asking(words), max_tokens=16)])
    whole = chunk // 128 * 128 if chunk else length
    assert job.tokens == reference.greedy_planned(job.prompt, 16, planned(words, length), whole)
    assert 0 < job.prefilled["density"]["mean"] < 1
    assert job.prefilled["tokens"] == length


@named(SPARSE)
def test_less_is_computed_and_it_shows(engine: Engine, words: dict[str, Any]) -> None:
    prompt = prompt_of(1900, 3)
    (dense,) = engine.run([Job(prompt, max_tokens=30)])
    (job,) = engine.run([Job(prompt, prefill=asking(words), max_tokens=30)])
    assert job.tokens != dense.tokens


@named([words for words in SPARSE if exact(words)])
def test_cuts_at_whole_blocks_change_nothing(engine: Engine, words: dict[str, Any]) -> None:
    prompt = prompt_of(1700)
    (whole,) = engine.run([Job(prompt, prefill=asking(words))])
    engine.forget_prefixes()
    engine.set_chunk(500)
    (chunked,) = engine.run([Job(prompt, prefill=asking(words))])
    assert chunked.tokens == whole.tokens
    assert chunked.prefilled["density"]["mean"] == pytest.approx(whole.prefilled["density"]["mean"], abs=1e-5)


def test_cached_prefixes_are_shared_by_pattern_and_arguments_alone(engine: Engine) -> None:
    prompt = prompt_of(1700)
    words = asking(SPARSE[0])
    (first,) = engine.run([Job(prompt, prefill=words)])
    (dense,) = engine.run([Job(prompt)])
    assert (first.cached_tokens, dense.cached_tokens) == (0, 0)
    (again,) = engine.run([Job(prompt, prefill=words)])
    assert again.cached_tokens == 1664 and again.tokens == first.tokens  # whole blocks of 128 queries
    assert again.prefilled["tokens"] == 36
    (other,) = engine.run([Job(prompt, prefill={**words, "threshold": 0.51})])
    (salted,) = engine.run([Job(prompt, prefill=words, salt="mine")])
    (delta,) = engine.run([Job(prompt, prefill=asking(SPARSE[7]))])
    assert (other.cached_tokens, salted.cached_tokens, delta.cached_tokens) == (0, 0, 0)
    (dense_again,) = engine.run([Job(prompt)])
    assert dense_again.cached_tokens == 1696 and dense_again.tokens == dense.tokens


@named([SPARSE[0], SPARSE[7]])
def test_a_chunk_behind_a_cached_prefix_sees_its_keys(
    engine: Engine, reference: Reference, words: dict[str, Any]
) -> None:
    """What a prefix was computed with is the same, so the answer is that of one prompt cut there."""
    prompt, other = prompt_of(1000), prompt_of(400, 7)
    engine.run([Job(prompt[:640], prefill=asking(words), max_tokens=1)])
    longer = prompt[:640] + other
    (job,) = engine.run([Job(longer, prefill=asking(words), max_tokens=16)])
    assert job.cached_tokens == 640
    if words["pattern"] == "xattention":  # a shorter prompt's last rows were dense with delta
        assert job.tokens == reference.greedy_planned(longer, 16, planned(words, len(longer)), 640)


def test_short_prompts_are_dense_and_share_the_cache(engine: Engine) -> None:
    prompt = prompt_of(700)
    (dense,) = engine.run([Job(prompt)])
    (job,) = engine.run([Job(prompt, prefill={"pattern": "streaming", "window": 1, "min_context": 701})])
    assert job.cached_tokens == 672 and job.tokens == dense.tokens
    assert job.prefilled["density"] == {"mean": 1.0}


def test_chunks_below_the_least_context_are_dense(engine: Engine, reference: Reference) -> None:
    words = {"pattern": "streaming", "sinks": 32, "window": 64, "min_context": 600}
    engine.set_chunk(512)
    (job,) = engine.run([Job(prompt_of(1000), prefill=words, max_tokens=16)])
    plain = planned(words, 1000)
    assert job.tokens == reference.greedy_planned(job.prompt, 16, plain, 512)


def test_concurrent_requests_answer_as_one_at_a_time(engine: Engine) -> None:
    """All patterns that any cut leaves alone, dense requests, policies and selectors, in chunks between decodes."""
    choices = [None, *(words for words in SPARSE if exact(words))]

    def jobs() -> list[Job]:
        found = []
        for i in range(24):
            words = choices[i % len(choices)]
            policy = {"policy": "snapkv", "budget": 160} if i % 3 == 0 else None
            decode = {"selector": "quest", "tokens": 96, "min_context": 0} if i % 4 == 1 and not policy else None
            job = Job(prompt_of(300 + 37 * i, i), policy, 10 + i % 7, decode, asking(words) if words else None)
            found.append(job)
        return found

    alone = [engine.run([job])[0] for job in jobs()]
    engine.forget_prefixes()
    engine.set_chunk(700)
    together = engine.run(jobs())
    assert [job.tokens for job in together] == [job.tokens for job in alone]
    for one, other in zip(together, alone, strict=True):
        if one.prefilled:
            assert one.prefilled["density"]["mean"] == pytest.approx(other.prefilled["density"]["mean"], abs=1e-5)


def test_preempted_prompts_answer_the_same(tiny_model: Any, engine: Engine) -> None:
    words = asking(SPARSE[0])
    prompts = [prompt_of(900 + i, 50 + i) for i in range(12)]
    alone = [engine.run([Job(prompt, prefill=words, max_tokens=140)])[0] for prompt in prompts]
    engine.forget_prefixes()
    held = engine.pool.get_new_blocks(engine.free - 130)
    together = engine.run([Job(prompt, prefill=words, max_tokens=140) for prompt in prompts])
    engine.pool.free_blocks(held)
    assert sum(job.preemptions for job in together) > 0
    assert [job.tokens for job in together] == [job.tokens for job in alone]


def test_a_policy_and_a_selector_in_the_same_request(engine: Engine) -> None:
    """What is kept of a prompt that was attended sparsely is what the policy sees of it, and more pages are read."""
    prompt, pattern = prompt_of(1200, 9), asking(SPARSE[0])
    policy = {"policy": "snapkv", "budget": 256}
    selector = {"selector": "recycled", "tokens": 96, "min_context": 0, "stride": 4}
    (all_three,) = engine.run([Job(prompt, policy, 24, selector, pattern)])
    assert all_three.usage["kept_tokens"]["mean"] < 300
    assert all_three.steps["reuse"] > 0
    assert all_three.prefilled["density"]["mean"] < 1
    engine.forget_prefixes()
    (no_selector,) = engine.run([Job(prompt, policy, 24, {**selector, "stride": 1}, pattern)])
    (two,) = engine.run([Job(prompt, policy, 24, None, pattern)])
    assert no_selector.tokens == two.tokens


def test_a_suffix_is_dense_and_the_rest_is_told(engine: Engine) -> None:
    """The policy compacts in front of the suffix, which has no pages in order any more."""
    policy = {"policy": "snapkv", "budget": 256, "suffix": 100}
    (job,) = engine.run([Job(prompt_of(1300, 4), policy, 12, None, asking(SPARSE[6]))])
    assert job.usage["kept_tokens"]["mean"] < 400
    assert 0 < job.prefilled["density"]["mean"] < 1 and job.prefilled["tokens"] == 1200
