"""`"report": "positions"`: what usage tells of kept positions is what the compressor has kept."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.harness import PAGE, Engine, Job
from tests.engine.test_answers import prompt_of

pytestmark = pytest.mark.engine

ASKED = {"report": "positions"}
POLICIES: list[dict[str, Any]] = [
    {"policy": "snapkv", "budget": 160},
    {"policy": "pyramidkv", "budget": 192},
    {"policy": "adakv", "budget": 208},
    {"policy": "d2o", "budget": 192},
    {"policy": "streamingllm", "budget": 150, "suffix": 40},
    {"policy": "snapkv", "budget": 160, "interval": 64},
    {"policy": "lfa", "budget": 160, "interval": 64, "suffix": 10},
]


def counted(job: Job) -> list[list[int]]:
    """By layer, kept (token, KV head) pairs in bins, from the positions of the last compaction."""
    boundary, kept = job.compactions[-1]
    seen = max(len(job.prompt), boundary)
    width = -(-seen // 256)
    rows = []
    for heads in kept:
        row = [0] * -(-seen // width)
        for head in heads:
            for position in [*head.tolist(), *range(boundary // PAGE * PAGE, seen)]:
                row[position // width] += 1
        rows.append(row)
    return rows


@pytest.mark.parametrize("length", [650, 1300])
@pytest.mark.parametrize("words", POLICIES, ids=lambda words: "-".join(map(str, words.values())))
def test_usage_tells_what_stays_by_layer_and_position(engine: Engine, words: dict[str, Any], length: int) -> None:
    (job,) = engine.run([Job(prompt_of(length), {**words, **ASKED}, max_tokens=140)])
    assert (len(job.compactions) > 1) == ("interval" in words)
    told = job.usage["kept_positions"]
    assert told["tokens"] == job.usage.get("compacted_tokens", length)
    assert told["by_layer"] == counted(job)
    each = [sum(row) / told["kv_heads"] for row in told["by_layer"]]
    kept = job.usage["kept_tokens"]
    assert (min(each), max(each)) == (kept["min"], kept["max"]) and sum(each) / len(each) == pytest.approx(kept["mean"])


def test_asking_changes_nothing_else(engine: Engine) -> None:
    words = POLICIES[1]
    (plain,) = engine.run([Job(prompt_of(650), words)])
    engine.forget_prefixes()
    (asked,) = engine.run([Job(prompt_of(650), {**words, **ASKED})])
    assert asked.tokens == plain.tokens
    assert "kept_positions" not in plain.usage
    told = dict(asked.usage)
    del told["kept_positions"]
    assert told == plain.usage


def test_nothing_is_told_where_nothing_was_dropped(engine: Engine) -> None:
    (whole,) = engine.run([Job(prompt_of(300), {"policy": "snapkv", "budget": 400, **ASKED})])
    assert "kept_positions" not in whole.usage and whole.usage["bytes_freed"] == 0


def test_requests_at_once_and_in_chunks_are_told_their_own(engine: Engine) -> None:
    engine.set_chunk(96)
    jobs = engine.run([Job(prompt_of(500 + 31 * i, i), {**POLICIES[i % 3], **ASKED}) for i in range(4)])
    for job in jobs:
        assert job.usage["kept_positions"]["by_layer"] == counted(job)
