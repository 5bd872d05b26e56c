"""Requests whose answers are compacted too, or whose prompt goes on behind its compaction."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from tests.engine.harness import PAGE, Engine, Job
from tests.engine.test_answers import prompt_of
from tests.reference import Reference

pytestmark = pytest.mark.engine

SUFFIXES: list[dict[str, Any]] = [
    {"policy": "snapkv", "budget": 160, "suffix": 45},
    {"policy": "pyramidkv", "budget": 192, "suffix": 1},
    {"policy": "adakv", "budget": 208, "suffix": 100},
    {"policy": "streamingllm", "budget": 150, "suffix": 64},
]
INTERVALS: list[dict[str, Any]] = [
    {"policy": "streamingllm", "budget": 150, "interval": 32},
    {"policy": "tova", "budget": 160, "interval": 40},
    {"policy": "snapkv", "budget": 192, "interval": 64, "window": 16},
    {"policy": "pyramidkv", "budget": 224, "interval": 64, "window": 16, "suffix": 70},
    {"policy": "keydiff", "budget": 240, "interval": 33, "layers": "zigzag", "window": 8},
    {"policy": "h2o", "budget": 160, "interval": 64},
    {"policy": "lra", "budget": 160, "interval": 64, "top": 8},
    {"policy": "lfa", "budget": 160, "interval": 32, "window": 32, "top": 8},
    {"policy": "raas", "budget": 130, "interval": 64, "alpha": 0.02},
]
IDS = [f"{words['policy']}-{words['budget']}" for words in INTERVALS]


@pytest.mark.parametrize("chunk", [None, 96])
@pytest.mark.parametrize("length", [641, 640])
@pytest.mark.parametrize("words", SUFFIXES, ids=lambda words: words["policy"])
def test_a_suffix_is_computed_over_what_was_kept(
    engine: Engine, reference: Reference, words: dict[str, Any], length: int, chunk: int | None
) -> None:
    engine.set_chunk(chunk)
    (job,) = engine.run([Job(prompt_of(length), words, max_tokens=30)])
    assert [boundary for boundary, _ in job.compactions] == [length - words["suffix"]]
    assert job.tokens == reference.greedy_compacted(job.prompt, 30, job.compactions, PAGE)
    assert job.tokens != reference.greedy(job.prompt, 30)[0]
    (head,) = engine.run([Job(job.prompt[: length - words["suffix"]], {**words, "suffix": 0})])
    kept = zip(head.kept, job.kept, strict=True)
    assert all(a.equal(b) for x, y in kept for a, b in zip(x, y, strict=True)), "compression has seen the suffix"
    assert job.usage["kept_tokens"]["mean"] == head.usage["kept_tokens"]["mean"] + words["suffix"]


@pytest.mark.parametrize("words", SUFFIXES, ids=lambda words: words["policy"])
def test_a_suffix_of_the_whole_prompt_leaves_nothing_to_compress(engine: Engine, words: dict[str, Any]) -> None:
    jobs = [Job(prompt_of(300)), *(Job(prompt_of(300), {**words, "suffix": suffix}) for suffix in (250, 300, 9999))]
    engine.run(jobs)
    assert all(job.tokens == jobs[0].tokens and not job.compactions for job in jobs)


@pytest.mark.parametrize("length", [400, 90])
@pytest.mark.parametrize("words", INTERVALS, ids=IDS)
def test_answers_are_compacted_every_interval(
    engine: Engine, reference: Reference, words: dict[str, Any], length: int
) -> None:
    """A prompt over the budget, and one that has to grow first."""
    (job,) = engine.run([Job(prompt_of(length), words, max_tokens=400)])
    step = -(-words["interval"] // PAGE) * PAGE
    boundaries = [boundary for boundary, _ in job.compactions]
    assert len(boundaries) >= 3
    if words["policy"] == "raas":
        assert boundaries[0] == -(-length // PAGE) * PAGE + words["budget"] // PAGE * PAGE + step
    elif length > words["budget"]:
        assert boundaries[0] == length - words.get("suffix", 0)
    else:
        assert boundaries[0] > words["budget"] and boundaries[0] % PAGE == 0
    assert all(boundary % PAGE == 0 for boundary in boundaries[1:])
    assert all(b - a == step for a, b in pairwise(boundaries[1:]))
    assert boundaries[-1] + step > length + 399
    for boundary, kept in job.compactions:
        for heads in kept:
            for positions in heads:
                assert positions.tolist() == sorted(set(positions.tolist()))
                assert len(positions) and int(positions[-1]) < boundary and positions[:4].tolist() == [0, 1, 2, 3]
    assert job.tokens == reference.greedy_compacted(job.prompt, 400, job.compactions, PAGE)
    assert job.usage["compacted_tokens"] == boundaries[-1]


def test_streamingllm_keeps_the_sinks_and_the_last(engine: Engine) -> None:
    (job,) = engine.run([Job(prompt_of(400), INTERVALS[0], max_tokens=300)])
    for boundary, kept in job.compactions[1:]:
        held = kept[0][0].tolist()
        assert held == [*range(4), *range(boundary - len(held) + 4, boundary)]


@pytest.mark.parametrize("words", INTERVALS, ids=IDS)
def test_held_memory_stays_flat(engine: Engine, words: dict[str, Any]) -> None:
    """Never more than the compacted pages, an interval and what a compaction reads."""
    job = engine.add(Job(prompt_of(90), words, max_tokens=700))
    step, most = -(-words["interval"] // PAGE) * PAGE, 0
    while not job.finished:
        engine.step()
        most = max(most, engine.all_free - engine.free)
    assert len(job.compactions) > 4
    budget = -(-words["budget"] // PAGE) + (3 if words["policy"] == "raas" else 0)  # and its prompt
    assert most <= budget + budget + step // PAGE + 3, "the first compaction has source and target"
    engine.forget_prefixes()
    late = engine.add(Job(prompt_of(90), words, max_tokens=700))
    while len(late.compactions) < 2:
        engine.step()
    engine.step()
    engine.step()
    while not late.finished:
        assert engine.all_free - engine.free <= budget + step // PAGE + 2
        engine.step()


def test_8000_tokens_from_a_prompt_of_1000_in_a_budget_of_1024(engine: Engine) -> None:
    words = {"policy": "streamingllm", "budget": 1024, "interval": 128}
    job = engine.add(Job(prompt_of(100), words, max_tokens=8000))
    held = []
    while not job.finished:
        engine.step()
        held.append(engine.all_free - engine.free)
    assert len(job.compactions) == (8100 - 1024) // 128
    assert max(held[1200:]) <= (1024 + 128) // PAGE + 2


@pytest.mark.parametrize("words", INTERVALS, ids=IDS)
def test_preemption_between_compactions_gives_the_same_answers(engine: Engine, words: dict[str, Any]) -> None:
    """The last of three is preempted when its answer has been compacted already; the replay compacts it again."""

    tokens = 600 if words["policy"] == "raas" else 330  # which begins later

    def jobs() -> list[Job]:
        return [Job(prompt_of(200 + 9 * i, i), words, max_tokens=tokens) for i in range(3)]

    alone = [engine.run([job])[0] for job in jobs()]
    engine.forget_prefixes()
    together = [engine.add(job) for job in jobs()]
    while len(together[2].compactions) < 3:
        engine.step()
    taken = []
    while not any(job.preemptions for job in together):
        if all(job.finished for job in together):
            break
        taken += engine.pool.get_new_blocks(engine.free)
        engine.step()
    engine.pool.free_blocks(taken)
    assert any(job.preemptions for job in together), "the test tests nothing"
    engine.finish()
    assert [job.tokens for job in together] == [job.tokens for job in alone]
    assert max(job.tokens_when_preempted for job in together) > 40


@pytest.mark.parametrize("tokens", [60, 75, 100, 130, 200])
def test_aborts_between_compactions_give_everything_back(engine: Engine, tokens: int) -> None:
    jobs = [engine.add(Job(prompt_of(120 + i, i), words, max_tokens=400)) for i, words in enumerate(INTERVALS)]
    while len(jobs[0].tokens) < tokens:
        engine.step()
    for job in jobs:
        engine.abort(job)
    engine.step()
    assert engine.free == engine.all_free


def test_a_compaction_that_could_never_have_its_blocks_is_left_out_and_told(engine: Engine) -> None:
    """Prompt and kept tokens would need more than the whole pool: the request would wait forever."""
    words = {"policy": "streamingllm", "budget": 7000}
    total = engine.pool.num_gpu_blocks
    engine.pool.num_gpu_blocks = 300
    try:
        (job,) = engine.run([Job(prompt_of(7500), words, max_tokens=3)])
    finally:
        engine.pool.num_gpu_blocks = total
    assert not job.compactions
    assert job.usage["not_compressed"] == (
        "its compaction would need 453 blocks, the KV cache has 299; a smaller budget needs fewer"
    )


def test_intervals_concurrently_as_alone(engine: Engine) -> None:
    def jobs() -> list[Job]:
        choices: list[dict[str, Any] | None] = [None, *INTERVALS, *SUFFIXES]
        return [Job(prompt_of(100 + 37 * i, i), choices[i % len(choices)], max_tokens=150 + i % 7) for i in range(20)]

    alone = [engine.run([job])[0] for job in jobs()]
    engine.forget_prefixes()
    engine.set_chunk(300)
    together = engine.run(jobs())
    assert [job.tokens for job in together] == [job.tokens for job in alone]
    assert [[b for b, _ in job.compactions] for job in together] == [[b for b, _ in job.compactions] for job in alone]
