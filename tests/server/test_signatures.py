"""What we take from vLLM is known by name and parameters, all of it, so that an upgrade is told what it breaks."""

from __future__ import annotations

from typing import Any

import pytest

from kvcache.vllm_adapter.compat import PRIVATE, PRIVATE_CPU, PRIVATE_CUDA, fingerprint, known, problems
from tests.signatures import collect, differences, overridden, resolve


@pytest.mark.usefixtures("flash_attention")
def test_the_file_is_complete() -> None:
    """`python -m tests.signatures --write` makes it so."""
    assert collect() == known()
    assert len(known()) > 100 and differences() == {}


@pytest.mark.usefixtures("flash_attention")
def test_every_override_is_checked_at_start_up() -> None:
    listed = [resolve(f"{module}:{path}") for module, path, _ in (*PRIVATE, *PRIVATE_CPU, *PRIVATE_CUDA)]
    found = set(overridden())
    assert {
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        "vllm.v1.worker.gpu_worker:Worker.execute_model",
    } <= found
    assert [key for key in sorted(found) if resolve(key) not in listed] == []


@pytest.mark.usefixtures("flash_attention")
def test_a_changed_signature_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    def add_request(self: Any, request: Any, priority: int = 0) -> None: ...

    monkeypatch.setattr(Scheduler, "add_request", add_request)
    where = "vllm.v1.core.sched.scheduler.Scheduler.add_request"
    assert problems() == [f"{where} takes (self, request, priority=), Longreach knows (self, request)"]
    monkeypatch.delattr(Scheduler, "_free_blocks")
    key = "vllm.v1.core.sched.scheduler:Scheduler"
    assert {name: now for name, (_, now) in differences().items()} == {
        f"{key}.add_request": "(self, request, priority=)",
        f"{key}._free_blocks": None,
    }


def test_fingerprints() -> None:
    def function(first: int, *rest: int, last: int = 1, **more: int) -> None: ...

    class Thing:
        size = property(len)

    assert fingerprint(function) == "(first, *rest, last=, **more)"
    assert [fingerprint(thing) for thing in (Thing, Thing.size, 5, pytest)] == ["class", "property", "int", "module"]
