"""One supervised server of their own for tests that break it: a tiny model, two requests at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.serving import Server, running_server
from tests.tiny_model import write_tiny_model, write_tiny_tokenizer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("faults")
    write_tiny_tokenizer(write_tiny_model(folder / "tiny"))
    flags = [
        "--supervise",
        "--served-model-name",
        "tiny",
        "--kv-cache-memory-bytes",
        str(100 << 20),
        "--max-num-seqs",
        "2",
    ]
    with pytest.MonkeyPatch.context() as patch:
        # What is imported by other tests makes vLLM quiet, and the log is looked at.
        patch.delenv("VLLM_LOGGING_LEVEL", raising=False)
        with running_server(Path(folder / "log"), str(folder / "tiny"), *flags) as server:
            yield server
