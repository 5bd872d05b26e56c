"""Memory is really given back, never leaked, and counted at admission."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.harness import PAGE, Engine, Job, same_kept
from tests.engine.test_answers import MERGERS, NAMES, POLICIES, WATCHERS, named, prompt_of

pytestmark = pytest.mark.engine

LAYERS, KV_HEADS, HEAD_DIM, FLOAT = 3, 2, 32, 4


def blocks_for(tokens: int) -> int:
    return -(-tokens // PAGE)


@pytest.mark.parametrize("length", [640, 650])
@named([*POLICIES, WATCHERS[0], MERGERS[0]])
def test_the_pool_holds_the_compressed_size_to_the_block(engine: Engine, words: dict[str, Any], length: int) -> None:
    job = engine.add(Job(prompt_of(length), words, max_tokens=50))
    engine.step()
    kept = engine.manager.plans[engine.internal(job).request_id].kept_pages
    assert engine.free == engine.all_free - blocks_for(length) - kept, "while the prompt runs: prompt and targets"
    engine.step()  # compacts
    while len(job.tokens) < 40:
        engine.step()
        tail_and_answer = blocks_for(length % PAGE + len(job.tokens) - 1)
        assert engine.free == engine.all_free - kept - tail_and_answer
    engine.finish()
    assert engine.free == engine.all_free
    held = kept + blocks_for(length % PAGE)
    assert job.usage["bytes_held"] == held * PAGE * LAYERS * KV_HEADS * 2 * HEAD_DIM * FLOAT
    assert job.usage["bytes_freed"] == (blocks_for(length) - held) * PAGE * LAYERS * KV_HEADS * 2 * HEAD_DIM * FLOAT


def test_bytes_per_kept_token_count_kv_heads(engine: Engine) -> None:
    """Under GQA a cache per query head would take twice this."""
    (job,) = engine.run([Job(prompt_of(640), {"policy": "snapkv", "budget": 320})])
    assert job.usage["kept_tokens"] == {"mean": 320.0, "min": 320.0, "max": 320.0}
    assert job.usage["bytes_held"] / 320 == LAYERS * KV_HEADS * 2 * HEAD_DIM * FLOAT


@named([words for words in POLICIES if "budget" in words])
def test_kept_memory_grows_with_the_budget(engine: Engine, words: dict[str, Any]) -> None:
    jobs = engine.run([Job(prompt_of(700), {**words, "budget": budget}, 2) for budget in range(110, 760, 50)])
    held = [job.usage["bytes_held"] for job in jobs]
    kept = [job.usage["kept_tokens"]["mean"] for job in jobs]
    assert held == sorted(held)
    assert kept == sorted(kept)
    assert len(set(held)) > 8
    for job, budget in zip(jobs, range(110, 760, 50), strict=True):
        assert budget - PAGE < job.usage["kept_tokens"]["mean"] <= min(budget, 700)


def test_20_requests_decode_at_once_where_4_dense_ones_fit(engine: Engine) -> None:
    """A pool for 4 dense requests of 6,000 tokens; 20 at budget 512 run together and none is preempted."""
    dense_blocks = 4 * blocks_for(6000 + 64)
    taken = engine.pool.get_new_blocks(engine.free - dense_blocks)
    try:
        jobs = [engine.add(Job(prompt_of(6000, i), {"policy": "snapkv", "budget": 512}, 100)) for i in range(20)]
        most = 0
        while not all(job.finished for job in jobs):
            engine.step()
            most = max(most, sum(bool(job.tokens) and not job.finished for job in jobs))
        assert most == 20
        assert not any(job.preemptions for job in jobs)
        assert all(job.kept for job in jobs)
        dense = [engine.add(Job(prompt_of(6000, 100 + i), None, 100)) for i in range(6)]
        at_once = 0
        while not all(job.finished for job in dense):
            engine.step()
            at_once = max(at_once, len(engine.scheduler.running))
        assert at_once == 4
    finally:
        engine.pool.free_blocks(taken)


@pytest.mark.parametrize(
    "words", [*POLICIES, WATCHERS[0], MERGERS[0], None], ids=[*NAMES, "h2o", "d2o-merging", "dense"]
)
def test_preemption_in_a_tiny_pool_gives_the_same_answers(engine: Engine, words: dict[str, Any] | None) -> None:
    """Three requests outgrow the pool while decoding: the last is preempted, starts again, replays its answer."""

    def jobs() -> list[Job]:
        return [Job(prompt_of(400 + 9 * i, i), words, max_tokens=260) for i in range(3)]

    alone = [engine.run([job])[0] for job in jobs()]
    for pool in range(28, 64, 2):
        engine.forget_prefixes()
        taken = engine.pool.get_new_blocks(engine.free - pool)
        try:
            together = engine.run(jobs())
        finally:
            engine.pool.free_blocks(taken)
        assert [job.tokens for job in together] == [job.tokens for job in alone]
        if any(job.tokens_when_preempted > 40 for job in together):
            assert not words or all(same_kept(a, b) for a, b in zip(alone, together, strict=True))
            return
    pytest.fail("no pool size led to a preemption after compaction: the test tests nothing")


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9])
def test_abort_at_any_point_gives_everything_back(engine: Engine, steps: int) -> None:
    """With chunks of 256, 700 tokens take three steps; compaction comes with the fourth."""
    engine.set_chunk(256)
    other = engine.add(Job(prompt_of(300, 9), POLICIES[0], max_tokens=30))
    while len(other.tokens) < 4:  # compacted, its prompt's blocks released
        engine.step()
    before = engine.free
    job = engine.add(Job(prompt_of(700), POLICIES[2], max_tokens=30))
    for _ in range(steps):
        engine.step()
    engine.abort(job)
    engine.step()
    assert before - engine.free in (0, 1), "the other request may have taken a block for its answer"
    engine.finish()
    assert len(other.tokens) == 30


def test_workers_forget_finished_requests(engine: Engine) -> None:
    engine.run([Job(prompt_of(400, i), POLICIES[i % len(POLICIES)]) for i in range(6)])
    engine.run([Job(prompt_of(40))])  # tells the worker who finished
    assert not engine.compressor.requests


def test_prompt_blocks_stay_in_the_prefix_cache(engine: Engine) -> None:
    """Released blocks keep their hashes: a dense request finds the whole prompt of a compacted one."""
    prompt = prompt_of(640)
    (cold,) = engine.run([Job(prompt)])
    engine.forget_prefixes()
    engine.run([Job(prompt, POLICIES[0])])
    (dense,) = engine.run([Job(prompt)])
    assert dense.cached_tokens == 640 - PAGE
    assert dense.tokens == cold.tokens
