"""Engines of their own: when one is dropped, vLLM tears down what another in the same process stands on, so these tests
have a folder that comes behind tests/engine."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", autouse=True)
def earlier_engines_are_gone() -> None:
    """One that waits for the garbage collector would be torn down under the next one's feet."""
    gc.collect()
