"""The checkers of deploy/, and what they are let loose on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Checker:
    """A program: of the environment (`make tools`), or of Debian (.ci/run)."""

    def __init__(self, name: str) -> None:
        beside = Path(sys.executable).parent / name
        found = str(beside) if beside.exists() else shutil.which(name)
        assert found, f"{name} is missing: `make tools` installs helm and docker-compose, .ci/run Debian's prometheus"
        self.program = found

    def __call__(self, *arguments: str | Path, fails: bool = False) -> str:
        """What it prints; its own words are the test's message where it doesn't end as expected."""
        command = [self.program, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
        assert bool(done.returncode) is fails, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stderr if fails else done.stdout


@pytest.fixture(scope="session")
def helm() -> Checker:
    return Checker("helm")


@pytest.fixture(scope="session")
def hadolint() -> Checker:
    return Checker("hadolint")


@pytest.fixture(scope="session")
def compose() -> Checker:
    return Checker("docker-compose")


@pytest.fixture(scope="session")
def promtool() -> Checker:
    return Checker("promtool")
