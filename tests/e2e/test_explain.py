"""`longreach explain` on the embedded model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e


def test_a_prompt_is_explained_in_text_and_page(tmp_path: Path) -> None:
    document = " ".join(f"Shelf {i} holds {i * 37 % 101} books about gardens." for i in range(60))
    question = f"{document}\nThe pass key is 48213. Remember it.\n{document}\nWhat is the pass key?"
    page = tmp_path / "page.html"
    command = [sys.executable, "-m", "server.cli", "explain", "-", "--output", str(page)]
    command += ["--kv-policy", "adakv", "--kv-budget", "25%"]
    # Whatever vLLM has to say goes elsewhere than the answer.
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    done = subprocess.run(command, input=question, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("adakv (budget 25%, ")
    assert "30 layers of 3 KV heads (2" in done.stdout
    assert "48213" in done.stdout.splitlines()[-1]
    assert page.read_text(encoding="utf-8").count("<i ") > 1200
