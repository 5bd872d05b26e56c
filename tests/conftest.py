"""Settings that must be made before any test module is imported."""

from __future__ import annotations

import os
from pathlib import Path

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


# Files that one process runs, in this order, before all others, which go file by file to whichever process is free.
TOGETHER = {
    "servers": ("e2e", "faults"),  # e2e shares one
    # In one process, because vLLM's engines need it to be tidied up before the next.
    "engines": ("engine", "examples", "inprocess", "models"),
}
GROUPS = {folder: (number, group) for number, (group, folders) in enumerate(TOGETHER.items()) for folder in folders}


def group_of(item: pytest.Item) -> tuple[int, str]:
    """Its place in the order, and what `pytest --dist loadgroup` (`make test`) keeps together."""
    file = item.path.relative_to(Path(__file__).parent)
    return GROUPS.get(file.parts[0], (len(GROUPS), str(file)))


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.xdist_group(group_of(item)[1]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest first, so that no process ends alone."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: group_of(item)[0])
