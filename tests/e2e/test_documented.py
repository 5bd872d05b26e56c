"""README.md and docs/clients.md are true: their code runs against the server, and prints what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.serving import Server

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "http://127.0.0.1:8000"
PRINTED = re.compile(r"```(python|sh)\n(.*?)```\n\nprints\n\n```\n(.*?)```", re.DOTALL)
BETWEEN = "<<< next >>>"


def shown(page: str, language: str) -> list[tuple[str, str]]:
    """Each piece of code of a page that says what it prints, with that."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [(code, printed) for kind, code, printed in PRINTED.findall(text) if kind == language]
    assert len(found) == text.count(f"```{language}\n"), f"{page}: code that doesn't say what it prints"
    assert found
    return found


def run(command: list[str], code: str, url: str) -> str:
    done = subprocess.run([*command, code.replace(ADDRESS, url)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", ["README.md", "docs/clients.md"])
def test_python_prints_what_the_page_says(page: str, bfloat16_server: Server) -> None:
    """A page's pieces are one program, so later ones may use names of earlier ones."""
    pieces = shown(page, "python")
    program = f"\nprint({BETWEEN!r})\n".join(code for code, _ in pieces)
    found = run([sys.executable, "-c"], program, bfloat16_server.url).split(f"{BETWEEN}\n")
    assert found == [printed for _, printed in pieces]


def test_curl_prints_what_the_page_says(bfloat16_server: Server) -> None:
    for code, printed in shown("docs/clients.md", "sh"):
        assert run(["bash", "-c"], code, bfloat16_server.url).rstrip("\n") == printed.rstrip("\n")
