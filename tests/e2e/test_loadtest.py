"""`longreach loadtest` against a real server."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.loadtest.cli import main
from benchmarks.loadtest.store import load
from benchmarks.serving import Server

pytestmark = pytest.mark.e2e


def test_compression_is_measured_beside_none(server: Server, tmp_path: Path) -> None:
    words = ["run", "--url", server.url, "--out", str(tmp_path), "--rates", "inf", "--requests", "3"]
    words += ["--seconds", "240"]
    words += ["--profile", "document,document=400,question=20,questions=3,output=12"]
    words += ["--variant", 'none={"kv_cache": {"policy": "none"}}']
    words += ["--variant", 'snapkv={"kv_cache": {"policy": "snapkv", "budget": 256}}']
    assert main(words) == 0
    none, snapkv = load([tmp_path]).cells
    assert (none.key.system, snapkv.key.system) == ("none", "snapkv")
    for cell in (none, snapkv):
        assert [request.status for request in cell.requests] == ["done"] * 3
        assert {request.prompt_tokens for request in cell.requests} == {420}
        assert {request.output_tokens for request in cell.requests} == {12}
        assert cell.metrics["total_input"] == 3 * 420 and cell.metrics["total_output"] == 36
        assert cell.watched["pool_tokens"] > 1000
    assert "compactions" not in none.watched["grown"] or none.watched["grown"]["compactions"] == 0
    assert snapkv.watched["grown"]["compactions"] == 3
    assert snapkv.usage["kv_cache"]["budget"] == 256 and none.usage["kv_cache"]["policy"] == "none"
    # The two loads ask the same documents, and the second finds nothing of the first in the prefix cache.
    assert snapkv.watched["grown"]["prefix_hits"] == none.watched["grown"]["prefix_hits"] <= 2 * 400
    page = (tmp_path / "report.html").read_text()
    assert "snapkv against none" in page
