"""The looks at batch invariance, without a GPU: a row's own numbers don't depend on what stands beside it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import invariance
from benchmarks.gpu.stress import Job, compare, difference
from tests import naive_flash


def test_a_row_has_the_same_pages_whatever_stands_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    naive_flash.install(monkeypatch)
    monkeypatch.setattr(invariance, "DEVICE", "cpu")
    monkeypatch.setitem(invariance.HEADS, 8, (4, 2))
    torch.manual_seed(0)
    cache = invariance.Cache(8, 3400)
    queries = cache.queries(20)
    (alone,) = cache.attend([(queries[-1:], 77)], 2)
    (whole,) = cache.attend([(queries, 77)], 2)
    torch.testing.assert_close(whole[-1:], alone)
    for make in invariance.batches(cache).values():
        batch = make(queries[-1:], 77)
        torch.testing.assert_close(cache.attend(batch, 2)[0], alone)
    (half,) = cache.attend([(queries[:10], 67)], 2)
    torch.testing.assert_close(whole[:10], half)


def test_differences_tell_where_an_answer_parts() -> None:
    job = Job("r0", [1] * 30, {"policy": "snapkv"}, 9, None, answer=(5, 6, 7), preemptions=1)
    alone = Job("r0", job.prompt, job.words, 9, None, answer=(5, 6, 8, 9), compacted=True)
    assert difference(job, alone) == {
        "name": "r0", "policy": "snapkv", "selector": None, "pattern": None, "prompt": 30, "compacted": True,
        "preemptions": 1, "token": 2,
    }  # fmt: skip


def test_answers_are_compared_as_far_as_they_got(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two jobs one was aborted early, and one differs."""
    from benchmarks.gpu import stress

    answers: dict[tuple[str, int], tuple[int, ...]] = {
        ("r0", 2): (1, 2), ("r1", 2): (1, 2, 3), ("r0", 1): (1, 2, 3), ("r1", 1): (1, 9, 3),
    }  # fmt: skip
    rows: list[dict[str, Any]] = []

    def run(llm: Any, jobs: list[Job], invariants: Any) -> None:
        for job in jobs:
            job.answer, job.compacted = answers[job.name, len(jobs)], job.name == "r1"

    monkeypatch.setattr(stress, "run", run)
    monkeypatch.setattr(stress, "say", lambda **row: rows.append(row))
    audit: Any = SimpleNamespace(used=0, peak=3, checks=5)
    core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=None))
    llm = SimpleNamespace(reset_prefix_cache=lambda: None, llm_engine=SimpleNamespace(engine_core=core))
    jobs = [Job("r0", [1], {"policy": "none"}, 3, 2), Job("r1", [1, 2], {"policy": "snapkv"}, 3, None)]
    compare(llm, jobs, audit, 2)
    assert rows[1]["compared_with_alone"] == 2 and rows[1]["same"] == 1
    assert rows[1]["compacted"] == rows[1]["different_compacted"] == 1
    assert [row["name"] for row in rows[1]["different"]] == ["r1"]
