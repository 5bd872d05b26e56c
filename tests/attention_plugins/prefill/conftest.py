"""`pytest tests/attention_plugins/prefill --device cuda` runs these tests on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import tests.device


@pytest.fixture(autouse=True)
def on_the_device() -> Iterator[None]:
    torch.set_default_device(tests.device.DEVICE)
    yield
    torch.set_default_device(None)
