"""The report of an upgrade: what is gone or changed, and which tests break, from pytest's own results."""

from __future__ import annotations

import sys
from pathlib import Path

from kvcache.vllm_adapter.compat import VLLM_VERSION
from tests.upgrade import copy_of_ourselves, report, run_tests


def test_the_copy_takes_the_other_release_for_its_own(tmp_path: Path) -> None:
    copy = copy_of_ourselves("9.8.7", tmp_path)
    for name in ("pyproject.toml", "kvcache/vllm_adapter/compat.py"):
        text = (copy / name).read_text()
        assert "9.8.7" in text and VLLM_VERSION not in text
    assert (copy / "tests" / "reference.py").exists() and not (copy / ".git").exists()


def test_the_page_names_what_broke(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(
        "import pytest\n"
        "def test_fine(): pass\n"
        "def test_broken(): assert 1 == 2, 'a | b'\n"
        "def test_skipped(): pytest.skip('no')\n"
        "@pytest.fixture\ndef bad(): raise OSError('gone')\n"
        "def test_error(bad): pass\n"
    )
    (tmp_path / "test_two.py").write_text("import no_such_module\n")
    results = run_tests(Path(sys.executable), tmp_path, ["."])
    symbols: dict[str, list[str | None]] = {"vllm.a:B.c": ["(self, x)", "(self)"], "vllm.a:d": ["()", None]}
    page = report("0.99.0", symbols, results, ["."])
    assert "1 names are gone and 1 changed. Of .: 1 passed, 1 failed, 2 error, 1 skipped." in page
    assert "| `vllm.a:B.c` | `(self, x)` | `(self)` |" in page and "| `vllm.a:d` | `()` | gone |" in page
    assert r"| test_one | 2 | AssertionError: a \| b" in page
    assert "| test_two | 1 |" in page
