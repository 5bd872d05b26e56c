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


SHARED = {"e2e", "engine", "faults", "inprocess"}
"""Folders whose tests share a server or an engine, or must follow each other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What goes to one process of pytest-xdist's (`-n 2 --dist loadgroup`): such a folder, else a file."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        item.add_marker(pytest.mark.xdist_group(folder if folder in SHARED else str(item.path)))


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no GPU")
    tests.device.DEVICE = torch.device(device)
