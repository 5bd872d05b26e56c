"""Answers with compression are what the mathematics says, whatever else goes on in the engine."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.engine.harness import PAGE, Engine, Job, same_kept
from tests.reference import Reference
from tests.tiny_model import VOCABULARY

pytestmark = pytest.mark.engine

POLICIES: list[dict[str, Any]] = [
    {"policy": "snapkv", "budget": 160},
    {"policy": "snapkv", "budget": 200, "window": 16, "pooling": "avg", "kernel": 5, "group_reduce": "max"},
    {"policy": "pyramidkv", "budget": 192},
    {"policy": "streamingllm", "budget": 150},
    {"policy": "l2norm", "budget": "30%"},
    {"policy": "random", "budget": 160, "seed": 3},
    {"policy": "zigzagkv", "budget": 176},
    {"policy": "adakv", "budget": 208},
    {"policy": "tova", "budget": 144},
    {"policy": "keydiff", "budget": 240, "layers": "zipvl", "heads": "adakv"},
    {"policy": "rkv", "budget": 152, "interval": 0},
    {"policy": "duoattention", "gates": [[0.1, 0.9], [0.2, 0.3], [0.8, 0.7]], "sinks": 8, "recent": 100},
]
NAMES = [f"{words['policy']}-{words.get('budget', 'gates')}" for words in POLICIES]
# These watch all of a prompt's queries, so they have no use for the prefix cache.
WATCHERS: list[dict[str, Any]] = [
    {"policy": "h2o", "budget": 160},
    {"policy": "observedattention", "budget": 144},
    {"policy": "d2o", "budget": 192, "merge": "none", "whole_first": 1},
]
MERGERS: list[dict[str, Any]] = [
    {"policy": "d2o", "budget": 192},
    {"policy": "d2o", "budget": 160, "merge": "scatter", "heads": "adakv"},
]


def named(policies: list[dict[str, Any]]) -> pytest.MarkDecorator:
    """A test for each of these."""
    ids = [f"{words['policy']}-{words.get('budget', 'gates')}" for words in policies]
    return pytest.mark.parametrize("words", policies, ids=ids)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed * 7919 + length)
    return [generator.randrange(VOCABULARY) for _ in range(length)]


@pytest.mark.parametrize("length", [641, 640, 655])
@named(POLICIES + WATCHERS)
def test_decoding_equals_dense_attention_with_evicted_columns_masked(
    engine: Engine, reference: Reference, words: dict[str, Any], length: int
) -> None:
    (job,) = engine.run([Job(prompt_of(length), words, max_tokens=40)])
    tokens, _ = reference.greedy(job.prompt, 40, job.kept, tail_from=length // PAGE * PAGE)
    assert job.tokens == tokens
    dense, _ = reference.greedy(job.prompt, 40)
    assert job.tokens != dense, "the policy changed nothing, so this test proves nothing"


@pytest.mark.parametrize("chunk", [64, 96, 160, 640])
@named(POLICIES + WATCHERS + MERGERS)
def test_chunked_prefill_keeps_the_same_tokens(engine: Engine, words: dict[str, Any], chunk: int) -> None:
    """641 = 10 * 64 + 1 = 4 * 160 + 1 = 640 + 1: the last chunk is one token, shorter than every window."""
    prompt = prompt_of(641)
    (whole,) = engine.run([Job(prompt, words)])
    engine.forget_prefixes()
    engine.set_chunk(chunk)
    (chunked,) = engine.run([Job(prompt, words)])
    assert same_kept(whole, chunked)
    assert chunked.tokens == whole.tokens


def test_32_concurrent_requests_answer_as_one_at_a_time(engine: Engine) -> None:
    def jobs() -> list[Job]:
        choices: list[dict[str, Any] | None] = [None, *POLICIES, WATCHERS[0], *MERGERS]
        return [Job(prompt_of(300 + 23 * i, i), choices[i % len(choices)], max_tokens=10 + i % 7) for i in range(32)]

    alone = [engine.run([job])[0] for job in jobs()]
    engine.forget_prefixes()
    engine.set_chunk(700)
    together = engine.run(jobs())
    assert [job.tokens for job in together] == [job.tokens for job in alone]
    assert all(same_kept(a, b) for a, b in zip(alone, together, strict=True) if a.words)


def test_shared_prefix_is_never_written(engine: Engine) -> None:
    """A dense request keeps decoding on blocks that a second request with the same prefix compacts from."""
    prefix = prompt_of(512)
    (dense_alone,) = engine.run([Job([*prefix, 1, 2, 3], max_tokens=60)])
    engine.forget_prefixes()
    dense = engine.add(Job([*prefix, 1, 2, 3], max_tokens=60))
    for _ in range(5):
        engine.step()
    for words in POLICIES:
        compressed = engine.add(Job([*prefix, 9, 8, 7, *prompt_of(60, 5)], words, max_tokens=5))
        while not compressed.finished:
            engine.step()
        assert compressed.kept
        assert compressed.cached_tokens is not None and compressed.cached_tokens >= 512
    engine.finish()
    assert dense.tokens == dense_alone.tokens
    (after,) = engine.run([Job([*prefix, 1, 2, 3], max_tokens=60)])
    assert after.cached_tokens == 512
    assert after.tokens == dense_alone.tokens


@pytest.mark.parametrize("words", POLICIES, ids=NAMES)
def test_prefix_hits_keep_the_same_tokens(engine: Engine, words: dict[str, Any]) -> None:
    """The second time all but the window comes from the prefix cache, the window's queries are computed again."""
    prompt = prompt_of(640)
    (cold,) = engine.run([Job(prompt, words)])
    (warm,) = engine.run([Job(prompt, words)])
    assert cold.cached_tokens == 0
    assert warm.cached_tokens is not None
    assert 640 - 3 * PAGE <= warm.cached_tokens < 640
    assert same_kept(cold, warm)
    assert warm.tokens == cold.tokens


@named(WATCHERS + MERGERS)
def test_a_prompt_that_is_watched_whole_takes_nothing_from_the_prefix_cache(
    engine: Engine, words: dict[str, Any]
) -> None:
    """Neither its own blocks nor a dense request's, and dense requests find its blocks all the same, unmerged."""
    prompt = prompt_of(640)
    (dense,) = engine.run([Job(prompt)])
    engine.forget_prefixes()
    (cold,) = engine.run([Job(prompt, words)])
    (warm,) = engine.run([Job(prompt, words)])
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 0)
    assert same_kept(cold, warm)
    assert warm.tokens == cold.tokens != dense.tokens
    (dense_warm,) = engine.run([Job(prompt)])
    assert dense_warm.cached_tokens == 640 - PAGE
    assert dense_warm.tokens == dense.tokens


def test_merged_tokens_change_answers(engine: Engine) -> None:
    """The same tokens are kept with and without."""
    prompt, words = prompt_of(641), {"policy": "d2o", "budget": 160}
    jobs = engine.run([Job(prompt, {**words, "merge": rule}, max_tokens=40) for rule in ("none", "paper", "scatter")])
    assert same_kept(jobs[0], jobs[1]) and same_kept(jobs[0], jobs[2])
    assert len({tuple(job.tokens) for job in jobs}) == 3


def test_answers_after_a_compacted_prompt_are_not_shared(engine: Engine) -> None:
    """Tokens decoded over a compacted prompt hold other keys than their hash would say."""
    prompt = prompt_of(600)
    (first,) = engine.run([Job(prompt, POLICIES[0], max_tokens=80)])
    longer = prompt + first.tokens
    (dense_warm,) = engine.run([Job(longer)])
    assert dense_warm.cached_tokens == 600 // PAGE * PAGE
    engine.forget_prefixes()
    (dense_cold,) = engine.run([Job(longer)])
    assert dense_warm.tokens == dense_cold.tokens


def test_requests_one_after_the_other_in_one_slot(engine: Engine) -> None:
    second = Job(prompt_of(500, 2), POLICIES[0])
    (fresh,) = engine.run([Job(second.prompt, second.words)])
    engine.forget_prefixes()
    engine.run([Job(prompt_of(700, 1), POLICIES[2])])
    (after,) = engine.run([second])
    assert after.tokens == fresh.tokens
    assert same_kept(after, fresh)


@pytest.mark.parametrize("budget", [641, 700, "100%"])
def test_a_budget_of_the_prompt_or_more_is_no_policy(engine: Engine, budget: int | str) -> None:
    prompt = prompt_of(641)
    (dense,) = engine.run([Job(prompt)])
    for words in POLICIES:
        if "budget" not in words:
            continue
        (job,) = engine.run([Job(prompt, {**words, "budget": budget})])
        assert job.tokens == dense.tokens
        assert not job.kept
        assert job.usage["bytes_freed"] == 0
        assert job.usage["kept_tokens"]["min"] == 641
