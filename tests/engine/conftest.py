from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.harness import Engine
from tests.reference import Reference
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def shared_engine(tiny_model: Path) -> Engine:
    return Engine(str(tiny_model))


@pytest.fixture(scope="session")
def reference(tiny_model: Path) -> Reference:
    return Reference(str(tiny_model))


@pytest.fixture
def engine(shared_engine: Engine) -> Iterator[Engine]:
    """The shared engine, empty before and after: a test that leaks a block fails."""
    shared_engine.set_chunk(None)
    shared_engine.forget_prefixes()
    yield shared_engine
    shared_engine.finish()
    assert shared_engine.free == shared_engine.all_free
    assert not shared_engine.manager.target_blocks
    assert not shared_engine.manager.plans
    assert not shared_engine.scheduler.compressions
