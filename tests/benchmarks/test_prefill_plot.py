"""The picture of sparse prefill, and what its scripts ask for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attention_plugins.prefill.registry import make_pattern, patterns
from benchmarks.gpu import prefill, prefill_plot
from benchmarks.quality import patterns as quality

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "2026-11-22-prefill-h100.json"


def test_shares_of_stock_vllms_time() -> None:
    rows = [
        {"system": "stock", "pattern": "dense", "prompt": 10, "batch": 1, "ttft_s": 2.0},
        {"system": "stock", "pattern": "dense", "prompt": 10, "batch": 4, "ttft_s": 9.0},
        {"system": "longreach", "pattern": "anchor", "prompt": 10, "batch": 1, "ttft_s": 0.5},
        {"system": "longreach", "pattern": "anchor", "prompt": 10, "batch": 4, "ttft_s": 3.0},
        {"together": "dense", "prompt": 10, "ttft_s": 2.0},
    ]
    assert prefill_plot.shares({"runs": [{"rows": rows}]}) == {"anchor": {10: 0.25}}


def test_what_was_measured_is_drawn(tmp_path: Path) -> None:
    prefill_plot.main([str(RESULTS), str(tmp_path / "picture.png")])
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    found = prefill_plot.shares(json.loads(RESULTS.read_text(encoding="utf-8")))
    assert found["dense"][126_000] == pytest.approx(1, abs=0.01) and found["streaming 5 %"][126_000] < 0.4


@pytest.mark.parametrize("label", list(prefill.PATTERNS))
@pytest.mark.parametrize("length", [16_384, 126_000])
def test_every_way_of_the_speed_test_can_be_asked_for(label: str, length: int) -> None:
    make_pattern(prefill.words_for(label, length))


@pytest.mark.parametrize("label", list(quality.PATTERNS))
def test_every_way_of_the_quality_test_plans_at_once(label: str) -> None:
    pattern = make_pattern(quality.words_of(label))
    assert pattern is not None and pattern.applies(20, 300)


def test_all_patterns_are_measured() -> None:
    assert {words["pattern"] for words in quality.PATTERNS.values()} == set(patterns())
