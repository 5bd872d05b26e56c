"""The embedded model's tokenizer, which the benchmarks' tests measure with."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.quality.passkeys import Tokenizer
from server.embedded import ensure_embedded_model


@pytest.fixture(scope="session")
def model_path() -> Path:
    return ensure_embedded_model()


@pytest.fixture(scope="session")
def tokenizer(model_path: Path) -> Tokenizer:
    loaded: Tokenizer = AutoTokenizer.from_pretrained(model_path)
    return loaded
