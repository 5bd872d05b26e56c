"""Selectors in the engine: dense where they have to be, what the mathematics says where not."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attention_plugins.decode.registry import selectors
from attention_plugins.vllm_adapter import worker
from tests.engine import selector_reference as by_hand
from tests.engine.harness import PAGE, Engine, Job
from tests.engine.test_answers import prompt_of
from tests.reference import Reads, Reference

pytestmark = pytest.mark.engine

SELECTORS: list[dict[str, Any]] = [
    {"selector": "recycled", "stride": 4, "kernel": 5, "window": 0},
    {"selector": "recycled", "stride": 1000, "similarity": 0.9, "check_every": 2, "kernel": 1, "window": 1},
    {"selector": "tidal", "kernel": 1, "heads": "own", "window": 0},
    {"selector": "lessismore", "kernel": 3},
    {"selector": "quest", "window": 0, "spread": 1},
    {"selector": "loki"},
    {"selector": "local", "share": 0.02},
]
WITH_POLICIES = [words for words in SELECTORS if selectors()[words["selector"]].with_policies]
each = pytest.mark.parametrize("selector", SELECTORS, ids=lambda words: "-".join(str(word) for word in words.values()))


def asking(selector: dict[str, Any], **words: Any) -> dict[str, Any]:
    return {"tokens": 96, "min_context": 0, **selector, **words}


@each
def test_reading_everything_is_dense_attention(engine: Engine, selector: dict[str, Any]) -> None:
    prompt = prompt_of(300)
    (dense,) = engine.run([Job(prompt, max_tokens=20)])
    (job,) = engine.run([Job(prompt, decode=asking(selector, tokens=320), max_tokens=20)])
    assert job.tokens == dense.tokens
    assert job.steps == {"dense": 19}


@each
def test_few_tokens_change_the_answer(engine: Engine, selector: dict[str, Any]) -> None:
    prompt = prompt_of(641)
    (dense,) = engine.run([Job(prompt, max_tokens=30)])
    (job,) = engine.run([Job(prompt, decode=asking(selector), max_tokens=30)])
    assert job.tokens != dense.tokens
    assert sum(job.steps.values()) == 29
    assert job.steps.get("dense", 0) == 0


REFERENCES: list[tuple[dict[str, Any], Callable[[], Reads]]] = [
    (SELECTORS[0], lambda: by_hand.Recycled(96, 4, kernel=5)),
    (SELECTORS[1], lambda: by_hand.Recycled(96, 1000, 0.9, 2, window=1, pinned=48)),
    ({"selector": "recycled", "kernel": 7}, lambda: by_hand.Recycled(96, 50, kernel=7, window=24)),
    ({"selector": "recycled", "stride": 4}, lambda: by_hand.Recycled(96, 4, kernel=21, window=24, pinned=48)),
    (
        {"selector": "recycled", "stride": 3, "pinned": 0.25, "kernel": 3},
        lambda: by_hand.Recycled(96, 3, kernel=3, window=24, pinned=24),
    ),
    (
        {"selector": "recycled", "stride": 9, "similarity": 0.9, "check_every": 2, "window": 16},
        lambda: by_hand.Recycled(96, 9, 0.9, 2, kernel=21, window=16, pinned=48),
    ),
    (SELECTORS[2], lambda: by_hand.Tidal(96, [1])),
    ({"selector": "tidal", "heads": "own"}, lambda: by_hand.Tidal(96, [1], window=24, pinned=48)),
    ({"selector": "tidal", "kernel": 3, "pinned": 0}, lambda: by_hand.Tidal(96, [1], kernel=3, shared=True)),
    (
        {"selector": "tidal", "kernel": 3, "window": 12, "pinned": 0.25},
        lambda: by_hand.Tidal(96, [1], kernel=3, shared=True, window=12, pinned=24),
    ),
    (SELECTORS[3], lambda: by_hand.LessIsMore(96, [0, 1], kernel=3)),
    (SELECTORS[4], lambda: by_hand.Quest(96, PAGE)),
    ({"selector": "quest", "tokens": 224}, lambda: by_hand.Quest(224, PAGE, window=32, pinned=5, spread=0.5)),
    (
        {"selector": "quest", "tokens": 288, "window": 5, "pinned": 0.25, "spread": 0.7},
        lambda: by_hand.Quest(288, PAGE, window=5, pinned=2, spread=0.7),
    ),
    (SELECTORS[5], lambda: by_hand.Loki(96)),
    (SELECTORS[6], lambda: by_hand.Local(96, 0.02, PAGE)),
]


@pytest.mark.parametrize("length", [640, 650])
@pytest.mark.parametrize(
    "selector, reads", REFERENCES, ids=lambda value: value["selector"] if isinstance(value, dict) else ""
)
def test_answers_are_what_the_formulas_say(
    engine: Engine, reference: Reference, selector: dict[str, Any], reads: Callable[[], Reads], length: int
) -> None:
    (job,) = engine.run([Job(prompt_of(length), decode=asking(selector), max_tokens=24)])
    assert job.tokens == reference.greedy_reading(job.prompt, 24, reads())


@pytest.mark.parametrize(
    ("words", "reads"),
    [
        ({"selector": "recycled", "stride": 4, "kernel": 5}, lambda: by_hand.Recycled(96, 4, kernel=5)),
        ({"selector": "tidal"}, lambda: by_hand.Tidal(96, [1], shared=True)),
        ({"selector": "quest", "spread": 1}, lambda: by_hand.Quest(96, PAGE)),
    ],
    ids=["recycled", "tidal", "quest"],
)
def test_what_one_prompt_chose_is_pinned_for_no_other(
    engine: Engine, reference: Reference, words: dict[str, Any], reads: Callable[[], Reads]
) -> None:
    """The next request has its place, and chooses step by step alone, as the papers do."""
    engine.run([Job(prompt_of(640, 1), decode=asking(words), max_tokens=12)])
    (job,) = engine.run([Job(prompt_of(650), decode=asking(words, window=0), max_tokens=24)])
    assert job.steps["select"] > 1
    assert job.tokens == reference.greedy_reading(job.prompt, 24, reads())


def test_a_stride_of_one_is_dense(engine: Engine) -> None:
    prompt = prompt_of(641)
    (dense,) = engine.run([Job(prompt, max_tokens=30)])
    (job,) = engine.run([Job(prompt, decode=asking({"selector": "recycled", "stride": 1}), max_tokens=30)])
    assert job.tokens == dense.tokens
    assert job.steps == {"select": 29}


@each
@pytest.mark.parametrize("chunk", [160, 640])
def test_chunked_prompts_and_shared_prefixes_answer_alike(engine: Engine, selector: dict[str, Any], chunk: int) -> None:
    prompt, words = prompt_of(641), asking(selector)
    (whole,) = engine.run([Job(prompt, decode=words)])
    (shared,) = engine.run([Job(prompt, decode=words)])
    assert shared.cached_tokens == 640
    engine.forget_prefixes()
    engine.set_chunk(chunk)
    (chunked,) = engine.run([Job(prompt, decode=words)])
    assert shared.tokens == chunked.tokens == whole.tokens


@pytest.mark.parametrize("chunk", [160, 630, 640])
def test_the_prompts_last_queries_are_computed_whatever_was_cached(engine: Engine, chunk: int) -> None:
    """Chunks end within the window (630) and before it; without a selector all but the last token is a hit."""
    prompt, words = prompt_of(641), asking({"selector": "recycled", "window": 24})
    (whole,) = engine.run([Job(prompt, decode=words)])
    (dense,) = engine.run([Job(prompt)])
    engine.set_chunk(chunk)
    (shared,) = engine.run([Job(prompt, decode=words)])
    assert (dense.cached_tokens, shared.cached_tokens) == (640, 608)
    engine.forget_prefixes()
    (chunked,) = engine.run([Job(prompt, decode=words)])
    assert shared.tokens == chunked.tokens == whole.tokens
    assert whole.steps == chunked.steps == {"reuse": 11}
    assert not engine.runtime.selecting.windows


def test_a_compressed_request_selects_at_its_first_step(engine: Engine) -> None:
    """What the window would be compared with isn't all there; K is less than what the policy keeps."""
    policy = {"policy": "snapkv", "budget": 192}
    (job,) = engine.run([Job(prompt_of(641), policy, 12, asking({"selector": "recycled"}))])
    assert job.steps == {"select": 1, "reuse": 10}


def test_concurrent_requests_answer_as_one_at_a_time(engine: Engine) -> None:
    """All selectors, dense and compressed requests, in phases of their own, while prompts arrive in chunks."""
    choices = [None, *SELECTORS, {"selector": "recycled"}]

    def jobs() -> list[Job]:
        found = []
        for i in range(24):
            decode = choices[i % len(choices)]
            words = {"policy": "snapkv", "budget": 160} if i % 5 == 0 and decode in [None, *WITH_POLICIES] else None
            asked = asking(decode, tokens=64) if decode else None
            found.append(Job(prompt_of(300 + 23 * i, i), words, 10 + i % 7, asked))
        return found

    alone = [engine.run([job])[0] for job in jobs()]
    engine.forget_prefixes()
    engine.set_chunk(700)
    together = engine.run(jobs())
    assert [job.tokens for job in together] == [job.tokens for job in alone]
    assert [job.steps for job in together] == [job.steps for job in alone]


@pytest.mark.parametrize("selector", WITH_POLICIES, ids=lambda words: words["selector"])
@pytest.mark.parametrize("words", [{"policy": "pyramidkv", "budget": 192}, {"policy": "adakv", "budget": 208}])
def test_over_a_compressed_cache_all_that_was_kept_is_the_policys_answer(
    engine: Engine, selector: dict[str, Any], words: dict[str, Any]
) -> None:
    """K is what a head holds on average; with a stride of one all heads are read whole, however long."""
    prompt = prompt_of(650)
    (kept,) = engine.run([Job(prompt, words, max_tokens=20)])
    (job,) = engine.run([Job(prompt, words, 20, asking(selector, tokens=256))])
    assert job.tokens == kept.tokens
    assert job.steps == {"dense": 19}
    if selector["selector"] == "recycled":
        (job,) = engine.run([Job(prompt, words, 20, asking({"selector": "recycled", "stride": 1}))])
        assert job.tokens == kept.tokens
        assert job.steps == {"select": 19}


@pytest.mark.parametrize("selector", WITH_POLICIES, ids=lambda words: words["selector"])
def test_interval_compactions_move_what_was_selected(engine: Engine, selector: dict[str, Any]) -> None:
    """With a list of all directions Loki is exact, and K as large as what is held is dense in all of them."""
    words = {"policy": "tova", "budget": 160, "interval": 32}
    (job,) = engine.run([Job(prompt_of(400), words, 100, asking(selector, tokens=64))])
    assert len(job.compactions) == 4
    assert sum(job.steps.values()) == 99
    if selector["selector"] == "recycled":
        assert job.steps["select"] >= 4, "after each compaction something has to be selected"


@each
def test_a_preempted_answer_goes_on(engine: Engine, selector: dict[str, Any]) -> None:
    """Its replay is dense, so what it has been told stays, and what follows may differ; nothing leaks."""
    taken = engine.pool.get_new_blocks(engine.free - 36)
    try:
        jobs = engine.run([Job(prompt_of(400 + 9 * i, i), None, 260, asking(selector)) for i in range(3)])
    finally:
        engine.pool.free_blocks(taken)
    assert any(job.tokens_when_preempted > 40 for job in jobs), "nothing was preempted: the test tests nothing"
    assert all(len(job.tokens) == 260 and sum(job.steps.values()) > 200 for job in jobs)
    assert not engine.scheduler.reads._requests


@pytest.mark.parametrize(
    "words",
    [{"selector": "recycled"}, {"selector": "tidal"}, {"selector": "quest", "tokens": 224}],
    ids=lambda words: words["selector"],
)
def test_what_the_prompt_chose_is_pinned_again_after_a_preemption(engine: Engine, words: dict[str, Any]) -> None:
    """By the same queries, which are computed again, over the prompt alone."""
    job = engine.add(Job(prompt_of(641), decode=asking(words), max_tokens=40))
    (pins,) = vars(engine.runtime.selecting.readers[words["selector"]].pins).values()
    while len(job.tokens) < 9:
        engine.step()
    before, place = pins.clone(), engine.scheduler.reads._requests[engine.internal(job).request_id].place
    pins.fill_(7)
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    while not job.finished:
        engine.step()
    assert len(before[:, place].unique()) > 2
    assert torch.equal(pins[:, place], before[:, place])


def test_answers_of_selectors_are_not_shared(engine: Engine) -> None:
    """Their tokens saw a part of what their hash says."""
    (job,) = engine.run([Job(prompt_of(320), None, 100, asking(SELECTORS[0]))])
    (again,) = engine.run([Job(job.prompt + job.tokens, max_tokens=2)])
    assert again.cached_tokens == 320


def test_states_run_out_and_usage_tells(engine: Engine) -> None:
    """32 rows may select in a step; the others read everything in it, as dense requests do."""
    jobs = [Job(prompt_of(200 + i, i), None, 8, asking(SELECTORS[0], tokens=32)) for i in range(34)]
    engine.run(jobs)
    crowded = [job.steps.get("crowded", 0) for job in jobs]
    assert sum(1 for steps in crowded if steps) >= 2
    assert all(sum(job.steps.values()) == 7 for job in jobs)


@each
def test_warming_up_touches_no_request(engine: Engine, selector: dict[str, Any]) -> None:
    """In the middle of an answer: rows that hold no request leave everything as it is."""
    prompt, words = prompt_of(500), asking(selector)
    (alone,) = engine.run([Job(prompt, None, 12, words)])
    job = engine.add(Job(prompt, None, 12, words))
    while not job.finished:
        engine.step()
        engine.runtime.selecting.warm_up(256)
    assert job.tokens == alone.tokens


@pytest.mark.parametrize("invariant", [True, False])
def test_caches_know_batch_invariant_mode(engine: Engine, invariant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's switch, as it is when the worker starts."""
    for layer in engine.worker.attention_layers:  # put back behind the test
        monkeypatch.setattr(layer.impl, "cache", layer.impl.cache)
    monkeypatch.setattr(worker, "envs", SimpleNamespace(VLLM_BATCH_INVARIANT=invariant))
    selecting = engine.worker._selecting(engine.runtime.compressor)
    known = [*selecting.caches, *(layer.impl.cache for layer in engine.worker.attention_layers)]
    assert {cache.invariant for cache in known} == {invariant}
