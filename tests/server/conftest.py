"""What tests of a start without an engine share."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from server.platforms import Platform
from tests import naive_flash

CPU = Platform("cpu", None)


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Namespace]:
    """Parse flags of `longreach serve` as on a CPU."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from server import arguments

    monkeypatch.setattr(FlexibleArgumentParser, "_search_keyword", None)  # `--help=...` leaves it behind

    def run(*argv: str) -> Namespace:
        return arguments.parse(list(argv), CPU)

    return run


@pytest.fixture
def no_unpacking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that stands for the embedded model."""
    monkeypatch.setattr("server.arguments.ensure_embedded_model", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that vLLM's build for CPUs lacks of what CUDA needs. What is registered for CUDA is forgotten afterwards."""
    from vllm.v1.attention.backends import registry

    naive_flash.install(monkeypatch)
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})
