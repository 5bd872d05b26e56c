"""Gemma 3 270M, where the user has installed it: CI hasn't (its terms are the user's to take)."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.quality.base_needles import Continued, prompt_of
from benchmarks.quality.passkeys import make_suite
from server.embedded import EmbeddedModelError, ensure_embedded_model
from server.embedded_models import GEMMA3
from tests.engine.harness import PAGE, Engine, Job
from tests.engine.test_stock import stock

pytestmark = pytest.mark.engine
LENGTH, WINDOW, LAYERS, SIZE = 1500, 512, 3, 256


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return ensure_embedded_model(model=GEMMA3)
    except EmbeddedModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine(str(folder), dtype="bfloat16", blocks=1600, decode={"selectors": ["quest"]})


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cases = make_suite(Continued(tokenizer), LENGTH, 4, columns=4, seed=1)
    prompts = [tokenizer(prompt_of(case))["input_ids"] for case in cases]
    assert all(prompt[0] == tokenizer.bos_token_id != prompt[1] for prompt in prompts)
    return prompts


def test_none_is_token_identical_to_stock_vllm(
    folder: Path, engine: Engine, prompts: list[list[int]], tmp_path: Path
) -> None:
    expected = stock(folder, "bfloat16", prompts, 16, tmp_path)
    for words in (None, {"policy": "none"}, {"policy": "snapkv", "budget": 4000}):
        engine.forget_prefixes()
        jobs = engine.run([Job(prompt, words, max_tokens=16) for prompt in prompts])
        assert [job.tokens for job in jobs] == expected


def test_the_full_attention_group_is_freed_to_the_block(engine: Engine, prompts: list[list[int]]) -> None:
    """3 of 18 layers; five groups of three slide."""
    prompt = prompts[0]
    job = engine.add(Job(prompt, {"policy": "pyramidkv", "budget": len(prompt) // 8}, max_tokens=40))
    engine.step()
    kept = engine.manager.plans[engine.internal(job).request_id].kept_pages
    full = len(prompt) // PAGE
    for _ in range(20):
        engine.step()
    tokens = len(prompt) + len(job.tokens) - 1
    sliding = -(-tokens // PAGE) - (tokens - WINDOW) // PAGE
    assert engine.free == engine.all_free - kept - (-(-tokens // PAGE) - full) - 5 * sliding
    engine.finish()
    assert engine.free == engine.all_free
    assert job.usage["bytes_freed"] == (full - kept) * PAGE * LAYERS * 2 * SIZE * 2
    assert job.usage["other_layers"]["layers"] == 15
