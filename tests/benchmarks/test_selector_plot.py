"""The picture of the selectors' speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.selector_plot import faster, main, whole_steps

DENSE = {"context": 126_000, "batch": 1, "selector": "dense", "ms": 6.0}


def reading(selector: str, kind: str, ms: float, context: int = 126_000, tokens: int = 2048) -> dict[str, Any]:
    return {"context": context, "batch": 1, "selector": selector, "kind": kind, "tokens": tokens, "ms": ms}


def step(system: str, selector: str, ms: float) -> dict[str, Any]:
    return {"system": system, "selector": selector, "prompt": 32768, "batch": 4, "tokens": 2048, "ms_a_step": ms}


RESULTS = {
    "date": "2026-11-22",
    "device": "H100, one of two",
    "runs": [
        {"command": "python -m benchmarks.gpu.reading", "note": "earlier", "rows": [DENSE, reading("quest", "", 2.5)]},
        {
            "command": "python -m benchmarks.gpu.reading --shapes 126000x1",
            "rows": [
                DENSE,
                reading("recycled", "full", 12.0),
                reading("recycled", "mean over a stride of 50", 1.0),
                reading("quest", "", 3.0, tokens=4096),
                reading("quest", "", 2.0),
                reading("quest", "", 1.2, context=32_000),
                reading("local", "all near", 4.0),
                reading("local", "all far", 10.0),
            ],
        },
        {"command": "python -m benchmarks.gpu.selector_steps stock", "rows": [step("stock", "dense", 12.0)]},
        {
            "command": "python -m benchmarks.gpu.selector_steps longreach",
            "rows": [{"start_s": 1.0}, step("longreach", "dense", 12.1), step("longreach", "quest", 8.0)],
        },
    ],
}


def test_one_bar_for_each_selector_and_the_last_run_counts() -> None:
    assert faster(RESULTS) == {1: {"recycled": 6.0, "quest": 3.0, "local": 1.5}}


def test_steps_beside_stock() -> None:
    assert whole_steps(RESULTS) == {(32768, 4): {"stock vLLM": 12.0, "dense": 12.1, "quest": 8.0}}


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    main(tmp_path / "results.json", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
