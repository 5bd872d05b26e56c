"""Quality over HTTP, small enough for CI; docs/results.md has the full run and its command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality.run import main
from benchmarks.serving import Server

pytestmark = pytest.mark.e2e


def test_passkeys_in_8_documents_of_3000_tokens(server: Server, tmp_path: Path) -> None:
    arguments = [
        "--base-url", f"{server.url}/v1", "--tokens", "3000", "--documents", "8", "--out", str(tmp_path),
        "--policies", "none", "snapkv:512", "pyramidkv:512", "streamingllm:512", "random:512", "snapkv:256",
        "--expect", "none>=8", "snapkv:512>=7", "pyramidkv:512>=7", "streamingllm:512==window",
        "random:512<snapkv:512",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert (tmp_path / "heatmap.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "results.json").read_text())
    server.wait_until_empty()
