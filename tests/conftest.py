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
