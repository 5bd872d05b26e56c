"""A model whose layers slide but for some: compression acts on those, and vLLM's own groups stay right beside it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.model_executor.models import registry

from tests.engine.harness import PAGE, Engine, Job, same_kept
from tests.engine.selector_reference import Quest
from tests.models.zoo import MAX_LEN, VOCABULARY, WINDOW, write
from tests.reference import Reference

pytestmark = pytest.mark.engine
SNAPKV: dict[str, Any] = {"policy": "snapkv", "budget": 200}
QUEST: dict[str, Any] = {"selector": "quest", "tokens": 64, "min_context": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write("gemma3", tmp_path_factory.mktemp("gemma3"))


@pytest.fixture(scope="module")
def shared(folder: Path) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        # vLLM asks each model class for its features in a process of its own (10 s each).
        patch.setattr(registry, "_run_in_subprocess", lambda ask: ask())
        return Engine(str(folder), blocks=600, max_model_len=MAX_LEN, decode={"selectors": ["quest"]})


@pytest.fixture(scope="module")
def keeping(folder: Path, shared: Engine) -> Engine:
    """Layers that slide leave all of their blocks to the prefix cache, those of answers too."""
    return Engine(str(folder), blocks=200, max_model_len=1024, prefix_cache_retention_interval=PAGE,
                  decode={"selectors": ["quest"]})  # fmt: skip


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    shared.set_chunk(None)
    shared.forget_prefixes()
    yield shared
    shared.finish()
    assert shared.free == shared.all_free


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed * 7919 + length)
    return [generator.randrange(3, VOCABULARY) for _ in range(length)]


@pytest.mark.parametrize("chunk", [None, 192, 130])
@pytest.mark.parametrize("words", [SNAPKV, {"policy": "pyramidkv", "budget": 160}], ids=lambda words: words["policy"])
def test_any_chunking_keeps_the_same(engine: Engine, folder: Path, words: dict[str, Any], chunk: int | None) -> None:
    engine.set_chunk(chunk)
    (job,) = engine.run([Job(prompt_of(650), words, max_tokens=24)])
    assert job.tokens == Reference(str(folder)).greedy(job.prompt, 24, job.kept, tail_from=640)[0]


@pytest.mark.parametrize("length", [640, 650])
def test_a_cut_prefix_hit_leaves_sliding_layers_their_window(engine: Engine, length: int) -> None:
    """The hit ends where the observation window begins, and the sliding layers' blocks before that are found again."""
    prompt = prompt_of(length)
    (cold,) = engine.run([Job(prompt, SNAPKV, max_tokens=24)])
    (warm,) = engine.run([Job(prompt, SNAPKV, max_tokens=24)])
    assert warm.cached_tokens == 608
    assert warm.tokens == cold.tokens
    assert same_kept(warm, cold)


@pytest.mark.parametrize("length", [640, 650, 700])
def test_a_compacted_request_finds_a_dense_ones_prompt(engine: Engine, length: int) -> None:
    prompt = prompt_of(length)
    (cold,) = engine.run([Job(prompt, SNAPKV, max_tokens=24)])
    engine.forget_prefixes()
    engine.run([Job(prompt)])
    (warm,) = engine.run([Job(prompt, SNAPKV, max_tokens=24)])
    assert warm.cached_tokens == (length - 32) // PAGE * PAGE
    assert warm.tokens == cold.tokens
    assert same_kept(warm, cold)


@pytest.mark.parametrize("extra", [{"words": SNAPKV}, {"decode": QUEST}], ids=["compacted", "selected"])
def test_answers_that_saw_less_are_never_shared(keeping: Engine, extra: dict[str, Any]) -> None:
    """Not by the sliding layers either: a dense request may fill the full-attention layers under the same hashes."""
    keeping.forget_prefixes()
    (first,) = keeping.run([Job(prompt_of(640), max_tokens=160, **extra)])
    assert shared_tokens(keeping, first) == [640, 640, 640]
    keeping.forget_prefixes()
    (dense,) = keeping.run([Job(prompt_of(640), max_tokens=160)])
    assert shared_tokens(keeping, dense) == [768, 768, 768]


def shared_tokens(engine: Engine, job: Job) -> list[int]:
    """By group, how much of a prompt and its answer the prefix cache has."""
    following = engine.add(Job(job.prompt + job.tokens, max_tokens=1))
    hashes = engine.internal(following).block_hashes
    coordinator = engine.scheduler.kv_cache_manager.coordinator
    _, lengths = coordinator.find_longest_cache_hit_per_group(hashes, len(following.prompt) - 1)
    engine.finish()
    return list(lengths)


def test_selectors_read_what_their_formula_says(engine: Engine, folder: Path) -> None:
    reference = Reference(str(folder))
    (job,) = engine.run([Job(prompt_of(650), decode=QUEST, max_tokens=40)])
    assert job.tokens == reference.greedy_reading(job.prompt, 40, Quest(QUEST["tokens"], PAGE))
    assert job.steps == {"select": 39}


def test_the_pool_holds_both_to_the_block(engine: Engine) -> None:
    """While the prompt runs: prompt and targets; then what is kept, and of the others what their window needs."""
    job = engine.add(Job(prompt_of(650), SNAPKV, max_tokens=60))
    engine.step()
    kept = engine.manager.plans[engine.internal(job).request_id].kept_pages
    groups = 2  # of two sliding layers each, as many as there are of full attention
    assert engine.free == engine.all_free - (1 + groups) * 21 - kept
    engine.step()
    for _ in range(40):
        engine.step()
        tokens = 650 + len(job.tokens) - 1
        skipped = (tokens - 1 - WINDOW + 1) // PAGE
        sliding = -(-tokens // PAGE) - skipped
        assert engine.free == engine.all_free - kept - (-(-tokens // PAGE) - 20) - groups * sliding
    engine.finish()
    block = 2 * PAGE * 2 * 256 * 4
    assert job.usage["bytes_held"] == (kept + 1) * block
    assert job.usage["bytes_freed"] == (20 - kept) * block
    assert job.usage["other_layers"] == {"layers": 4, "bytes_held": groups * (21 - (650 - WINDOW + 1) // PAGE) * block}


def test_32_requests_at_once_answer_as_one_at_a_time(engine: Engine) -> None:
    words = [SNAPKV, None, {"policy": "pyramidkv", "budget": 160}, {"policy": "expectedattention", "budget": 160}]

    def jobs() -> list[Job]:
        return [Job(prompt_of(300 + 7 * i, i), words[i % 4], decode=[None, QUEST][i % 3 == 0]) for i in range(32)]

    alone = [engine.run([job])[0].tokens for job in jobs()]
    engine.forget_prefixes()
    assert [job.tokens for job in engine.run(jobs())] == alone


def test_a_preempted_request_gives_the_same_answer(engine: Engine) -> None:
    """The pool is taken away while three requests decode; the last starts again, is compacted again, and goes on."""

    def jobs() -> list[Job]:
        return [Job(prompt_of(400 + 9 * i, i), SNAPKV, max_tokens=120) for i in range(3)]

    alone = [engine.run([job])[0] for job in jobs()]
    engine.forget_prefixes()
    together = jobs()
    engine.run(together, until=lambda: all(len(job.tokens) > 30 for job in together))
    taken = engine.pool.get_new_blocks(engine.free)
    engine.run([], until=lambda: bool(together[2].preemptions))
    engine.pool.free_blocks(taken)
    engine.finish()
    assert together[2].tokens_when_preempted > 30
    assert [job.tokens for job in together] == [job.tokens for job in alone]
    assert all(same_kept(a, b) for a, b in zip(alone, together, strict=True))
