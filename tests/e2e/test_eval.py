"""`longreach eval` against a real server: the figures come from what really ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from benchmarks.evaluation.cli import main
from benchmarks.evaluation.store import read
from benchmarks.evaluation.tokens import Prompter, RemoteTokenizer, load_tokenizer
from benchmarks.serving import Server

pytestmark = pytest.mark.e2e


def test_a_small_sweep(server: Server, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({
        "suites": {
            "needle": {"lengths": [700], "depths": 1, "samples": 1},
            "perplexity": {"lengths": [700], "samples": 1, "continuation": 32},
            "agreement": {"lengths": [600], "samples": 1, "answer": 8},
            "speed": {"lengths": [400], "samples": 1, "answer": 4},
        },
        "policies": ["snapkv"], "budgets": ["50%"], "questions": ["known", "unknown"],
        "selectors": [{"selector": "recycled", "tokens": 256, "min_context": 0}], "concurrency": 4,
    }))  # fmt: skip
    out = tmp_path / "out"
    assert main(["run", str(sweep), "--out", str(out), "--url", f"{server.url}/v1"]) == 0
    rows = {(row.suite, row.index, row.variant): row for row in read(out)}
    assert all(row.status == "ok" and row.prompt_tokens == row.sent_tokens for row in rows.values())
    known, unknown, recycled = "snapkv 50%", "snapkv 50%, question unknown", "recycled 256"
    assert rows["needle", 0, "dense"].score == 1.0 and rows["needle", 0, "dense"].kept == 1.0
    for variant in (known, unknown):
        kept = rows["needle", 0, variant].kept
        assert kept is not None and 0.4 < kept <= 0.5
    assert rows["needle", 0, recycled].steps and rows["agreement", 0, "dense"].score == 1.0
    # A compacted document predicts its continuation a little worse; reading it whole is the same every time.
    dense, compacted = rows["perplexity", 0, "dense"], rows["perplexity", 0, unknown]
    assert 2 < dense.measures["perplexity"] < 100 and compacted.measures["nll"] != dense.measures["nll"]
    assert abs(compacted.measures["nll"] - dense.measures["nll"]) < 1
    assert (rows["speed", 0, known].ttft or 0) > 0
    assert (out / "report.html").exists()
    server.wait_until_empty()


def test_the_servers_own_tokenizer_makes_the_same_prompts(server: Server) -> None:
    card = json.loads(server.get("/v1/models"))["data"][0]
    local = load_tokenizer(None, card, server.url)
    remote = RemoteTokenizer(server.url, card["id"])
    assert not isinstance(local, RemoteTokenizer)
    assert Prompter(remote).fingerprint() == Prompter(local).fingerprint()
