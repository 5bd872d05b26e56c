"""Settings that must be made before any test module is imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.device

# Kernels run in Triton's interpreter where there is no GPU. Triton reads this when it is imported, and vLLM imports
# it: in tests/kernels, the tests of other folders would already have done so.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="where the code under test runs (tests/kvcache, tests/attention_plugins/prefill)",
    )
    parser.addoption(
        "--matrix-rows",
        type=Path,
        metavar="FILE",
        help="rows that tests/models/test_matrix.py judges, written by `python -m tests.models.matrix --cuda`; left "
        "out, it runs the matrix here",
    )
    parser.addoption(
        "--model-steps",
        type=int,
        default=100_000,
        metavar="N",
        help="of the state machine of scheduler, block pool and page tables (tests/kvcache/test_state_machine.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no GPU")
    tests.device.DEVICE = torch.device(device)


# Folders that one process runs, in this order and before all other files, which go to whichever process is free.
TOGETHER = {
    "e2e": "servers",  # its tests share one
    "faults": "servers",
    # In one process, because vLLM's engines need it to be tidied up before the next.
    "engine": "engines",
    "examples": "engines",
    "inprocess": "engines",
    "models": "engines",
}


def folder_of(nodeid: str) -> str:
    return nodeid.split("/")[1]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """That of `--dist loadgroup` (`make test`); xdist's own groups nothing with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return TOGETHER.get(folder_of(nodeid), nodeid.split("::")[0])

    return Together(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow folders first where processes share the tests, so that none ends long before the others."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = list(TOGETHER)
        items.sort(key=lambda item: order.index(folder) if (folder := folder_of(item.nodeid)) in order else len(order))
