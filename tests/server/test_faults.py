"""Errors that end a worker's start: told to the server, explained in a line, with an exit code of their kind."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvcache.vllm_adapter import start_faults
from kvcache.vllm_adapter.start_faults import STARTING, telling
from server.errors import Exit
from server.faults import StartWatch, explain, kill_children

ROOT = Path(__file__).resolve().parents[2]


class Vllms:
    """The methods of a worker of vLLM's; one of them fails."""

    failing = ""
    error: BaseException = RuntimeError()

    def __init__(self, instance_id: str = "tests") -> None:
        self.vllm_config = SimpleNamespace(instance_id=instance_id)

    def _step(self, name: str) -> str:
        if name == self.failing:
            raise self.error
        return name

    def init_device(self) -> str:
        return self._step("init_device")

    def load_model(self) -> str:
        return self._step("load_model")

    def determine_available_memory(self) -> str:
        return self._step("determine_available_memory")

    def initialize_from_config(self) -> str:
        return self._step("initialize_from_config")

    def compile_or_warm_up_model(self) -> str:
        return self._step("compile_or_warm_up_model")


@telling
class Worker(Vllms):
    pass


def test_vllms_workers_have_these_steps() -> None:
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.worker_base import WorkerBase

    from attention_plugins.vllm_adapter.cpu_worker import CPUCompressionWorker

    for name in STARTING:
        assert hasattr(WorkerBase, name) or hasattr(CPUWorker, name)
        assert hasattr(getattr(CPUCompressionWorker, name), "__wrapped__"), name


@pytest.mark.parametrize("step", STARTING)
def test_each_step_tells_its_error_and_raises_it(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    monkeypatch.setattr(start_faults, "PATIENCE", 0)
    monkeypatch.setattr(Vllms, "failing", step)
    monkeypatch.setattr(Vllms, "error", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nMore"))
    killed: list[bool] = []
    with StartWatch("tests", lambda: killed.append(True)) as watch:
        for name in STARTING:
            if name != step:
                assert getattr(Worker(), name)() == name
        with pytest.raises(torch.OutOfMemoryError):
            getattr(Worker(), step)()
    error: Any = watch.error
    assert (killed, error.code) == ([True], Exit.MEMORY)
    assert str(error).startswith("the engine didn't start: CUDA out of memory. Tried to allocate 2 GiB. Lower --")


def test_without_a_listener_or_with_debugging_vllm_goes_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Vllms, "failing", "load_model")
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(RuntimeError):
        Worker().load_model()
    assert waits == []
    vllms = logging.getLogger("vllm")
    before = vllms.level
    with StartWatch("tests", lambda: None):
        for level, expected in ((logging.DEBUG, []), (logging.INFO, [start_faults.PATIENCE])):
            vllms.setLevel(level)
            try:
                with pytest.raises(RuntimeError):
                    Worker().load_model()
            finally:
                vllms.setLevel(before)
            assert waits == expected


def chain(*errors: BaseException) -> list[dict[str, Any]]:
    return [{"type": f"{type(error).__module__}.{type(error).__qualname__}", "text": str(error),
             "errno": getattr(error, "errno", None)} for error in errors]  # fmt: skip


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("step", "errors", "code", "words"),
    [
        ("load_model", [torch.OutOfMemoryError("CUDA out of memory")], Exit.MEMORY, "--gpu-memory-utilization"),
        ("load_model", [MemoryError()], Exit.MEMORY, "MemoryError. Lower"),
        ("initialize_from_config", [RuntimeError("you tried to allocate; not enough memory")], Exit.MEMORY, "Lower"),
        ("determine_available_memory", [ValueError("To serve ... 3 GiB KV cache is needed. See https://x")],
         Exit.MEMORY, r"needed\. Lower"),
        ("init_device", [ValueError("Free memory on device (1/80 GiB) on startup is less")], Exit.MEMORY, "Lower"),
        ("load_model", [RuntimeError("safetensors"), FULL], Exit.DISK, "Free space"),
        ("compile_or_warm_up_model", [FULL], Exit.DISK, "TRITON_CACHE_DIR"),
        ("load_model", [ValueError("There is no parameter named x" + ", y" * 999)], Exit.MODEL, r" \.\.\.\. Copy"),
        ("compile_or_warm_up_model", [KeyError("a bug")], Exit.ENGINE, "VLLM_LOGGING_LEVEL=DEBUG"),
    ],
)  # fmt: skip
def test_errors_are_of_a_kind(step: str, errors: list[BaseException], code: Exit, words: str) -> None:
    error = explain(step, chain(*errors))
    assert error.code == code
    with pytest.raises(type(error), match=words):
        raise error
    assert "\n" not in str(error) and len(str(error)) < 600


def test_the_engine_and_its_workers_are_killed_before_they_print() -> None:
    """A worker in a process of its own, below another, as vLLM starts them."""
    worker = (
        "from types import SimpleNamespace; from kvcache.vllm_adapter.start_faults import STARTING, telling\n"
        "def fail(self): raise MemoryError\n"
        "Worker = telling(type('Worker', (), dict.fromkeys(STARTING, fail)))\n"
        "worker = Worker(); worker.vllm_config = SimpleNamespace(instance_id='killed'); worker.load_model()"
    )
    engine = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {worker!r}]))"
    begin = time.monotonic()
    with StartWatch("killed", kill_children) as watch:
        ended = subprocess.run([sys.executable, "-c", engine], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (ended.returncode, ended.stderr) == (-9, "")
    assert time.monotonic() - begin < start_faults.PATIENCE
    error: Any = watch.error
    assert error.code == Exit.MEMORY
