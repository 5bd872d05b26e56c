"""Servers of a checkout that isn't installed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import pytest

from benchmarks import serving


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("benchmarks.serving.metadata.distribution", missing)


def test_an_installed_one_gets_what_we_have() -> None:
    assert serving.environment() == dict(os.environ)


@pytest.mark.usefixtures("not_installed")
def test_vllm_finds_the_plug_ins_of_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of the installed package, in a process that sees no other packages than what PYTHONPATH has."""
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    given = serving.environment()
    assert given["PYTHONPATH"].split(os.pathsep)[1:] == [str(serving.ROOT), "/somewhere"]
    script = (
        "from importlib.metadata import distribution; own = distribution('longreach')\n"
        "print(own.version, *sorted(f'{e.group}:{e.name}={e.value}' for e in own.entry_points))"
    )
    told = subprocess.run([sys.executable, "-S", "-c", script], env=given, capture_output=True, text=True, check=True)
    installed = next(one for one in metadata.distributions(name="longreach"))
    entries = sorted(f"{entry.group}:{entry.name}={entry.value}" for entry in installed.entry_points)
    assert told.stdout.split() == [installed.version, *entries] and any("vllm.endpoint_plugins" in e for e in entries)
