"""The benchmark of what policies cost, on a small cache without a GPU: every policy in its table can be measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.gpu import compaction
from kvcache.registry import BUILT_IN


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is printed, with two layers and a clock in place of the GPU's."""
    found: list[dict[str, Any]] = []

    def timed(work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    shapes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    monkeypatch.setattr(compaction, "LLAMA_8B", shapes)
    for name, value in {"DEVICE": "cpu", "BUDGET": 128, "CHUNK": 256, "timed": timed}.items():
        monkeypatch.setattr(compaction, name, value)
    for name in ("synchronize", "reset_peak_memory_stats", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(compaction, "say", lambda **row: found.append(row))
    return found


def test_all_policies_that_compress_prompts_are_measured() -> None:
    assert {policy.name for policy in BUILT_IN} - set(compaction.POLICIES) == {"raas"}


@pytest.mark.parametrize("policy", ["snapkv", "namm", "duoattention"])
def test_a_policy_is_watched_and_compacted(policy: str, rows: list[dict[str, Any]]) -> None:
    compaction.measure(compaction.Cache(600), policy)
    (row,) = rows
    assert row["policy"] == policy and row["watching_ms"] > 0 and row["compaction_ms"] > 0
    assert ("interval_ms" in row) == (policy == "snapkv")


def test_what_takes_long_runs_once(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def compact(policy: str) -> dict[str, float]:
        runs.append(policy)
        return {"watching_ms": 20_000.0, "compaction_ms": 1.0}

    cache = compaction.Cache(600)
    monkeypatch.setattr(cache, "compact", compact)
    compaction.measure(cache, "namm")
    assert runs == ["namm"] and rows[0]["watching_ms"] == 20_000
