"""The CUDA adapter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests import naive_flash

if TYPE_CHECKING:
    from tests.attention_plugins.cuda_world import World


@pytest.fixture
def cuda_backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The adapter's module, over the naive kernel."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("needs Triton's interpreter, which is off where there is a GPU")
    naive_flash.install(monkeypatch)
    from attention_plugins.vllm_adapter import cuda_backend

    # It may have been imported before, by a test with a stand-in of its own.
    monkeypatch.setattr(cuda_backend, "flash_attn_varlen_func", naive_flash.flash_attn_varlen_func)
    return cuda_backend


@pytest.fixture
def make_world(cuda_backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    from attention_plugins.vllm_adapter.runtime import set_runtime
    from tests.attention_plugins.cuda_world import World

    worlds: list[World] = []

    def make(**settings: Any) -> World:
        worlds.append(World(cuda_backend, monkeypatch.setattr, **settings))
        return worlds[-1]

    yield make
    for world in worlds:
        set_runtime(world.config, None)
