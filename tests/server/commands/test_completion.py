"""Completion in real shells, which find no `longreach` while they complete: the scripts hold everything."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from server.commands.completion import SHELLS
from server.completion import script

PATH = "/usr/bin:/bin"
START = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}
SETUP = {"bash": "source {file}", "zsh": "fpath=({file.parent} $fpath); autoload -Uz compinit; compinit -D -u"}
"""What a person's start-up files do, with the script where `longreach completion --help` puts it."""
NAMES = {"bash": "longreach", "zsh": "_longreach", "fish": "longreach.fish"}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("completion")

    def made(shell: str) -> Path:
        if shutil.which(shell, path=PATH) is None:
            if os.environ.get("CI"):
                pytest.fail(f"{shell} is not installed (requirements/debian.txt)")
            pytest.skip(f"{shell} is not installed")
        file = folder / NAMES[shell]
        if not file.exists():
            file.write_text(script(shell))
        return file

    return made


def typed(shell: str, file: Path, text: str, expected: str, folder: Path) -> str:
    """What a terminal shows when a person types this and presses Tab, until the expected is there or 20 s are over."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execvpe(START[shell][0], START[shell], {"PATH": PATH, "HOME": str(folder), "TERM": "dumb", "PS1": "$ "})
    try:
        os.write(terminal, f"{SETUP[shell].format(file=file)}; PS1='rea''dy '\n".encode())
        _read(terminal, "ready ")
        os.write(terminal, f"{text}\t".encode())
        return _read(terminal, expected)
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


def _read(terminal: int, until: str) -> str:
    seen, end = "", time.monotonic() + 20
    while until not in seen and time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 4096).decode(errors="replace")
    return seen


TYPED = [
    ("longreach sele", "selectors"),
    ("longreach serve --kv-pol", "--kv-policy"),
    ("longreach serve --kv-policy pyra", "pyramidkv"),
    ("longreach serve --decode-selectors recy", "recycled"),
    ("longreach serve --max-model-l", "--max-model-len"),
    ("longreach serve --kv-head-gates our-ga", "our-gates.tsv"),
    ("longreach explain a.txt --kv-heads ada", "adakv"),
    ("longreach eval run --questions kno", "known"),
    ("longreach completion fi", "fish"),
]


@pytest.mark.parametrize(("text", "expected"), TYPED, ids=[text for text, _ in TYPED])
@pytest.mark.parametrize("shell", SHELLS)
def test_tab_completes(shell: str, text: str, expected: str, scripts: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "our-gates.tsv").touch()
    file = scripts(shell)
    assert shutil.which("longreach", path=PATH) is None
    if shell == "fish":  # it says itself what Tab would offer
        done = subprocess.run(
            ["fish", "-N", "-c", f"source {file}; complete -C '{text}'"],
            cwd=tmp_path, env={"PATH": PATH, "HOME": str(tmp_path)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.stderr == "" and expected in [line.split("\t")[0] for line in done.stdout.splitlines()]
    else:
        assert text not in expected and expected in typed(shell, file, text, expected, tmp_path)
