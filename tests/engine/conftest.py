from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from attention_plugins.decode.registry import selectors
from tests.engine.harness import Engine
from tests.reference import Reference
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny model: Loki with all directions is exact, and one layer behind the one that selects."""
    torch.manual_seed(5)
    basis = torch.linalg.qr(torch.randn(3, 2, 32, 32)).Q.contiguous()
    file = tmp_path_factory.mktemp("calibration") / "tiny.safetensors"
    found = {"loki.basis": basis, "tidal.layers": torch.tensor([1]), "lessismore.layers": torch.tensor([0, 1])}
    save_file(found, file)
    return file


@pytest.fixture(scope="session")
def shared_engine(tiny_model: Path, calibration: Path) -> Engine:
    decode = {"selectors": list(selectors()), "states": 32, "calibration": str(calibration)}
    return Engine(str(tiny_model), decode=decode)


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
    assert not shared_engine.scheduler.prefills
    assert not shared_engine.runtime.prefilling.prompts
