"""One real server with the embedded model for all end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI

from benchmarks.serving import Server, running_server
from server.cpus import lacks_avx512
from tests.e2e.canary import Canary

FLAGS = [
    "--kv-policy", "snapkv", "--kv-budget", "512",
    "--decode-selectors", "recycled", "quest", "tidal",
    "--kv-audit", "1",  # a test that breaks the cache ends the server
    "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
]  # fmt: skip


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded model with a compressing default, as `longreach serve` without a model gives it."""
    with running_server(tmp_path_factory.mktemp("server") / "log", *FLAGS) as server:
        yield server


@pytest.fixture(scope="session")
def bfloat16_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same in bfloat16: another one where `longreach serve` takes float32."""
    if not lacks_avx512():
        yield request.getfixturevalue("server")
        return
    with running_server(tmp_path_factory.mktemp("bfloat16") / "log", *FLAGS, "--dtype", "bfloat16") as server:
        yield server


@pytest.fixture(scope="session")
def client(server: Server) -> OpenAI:
    # The client's own timeout would give up on long prompts on a slow machine, and a retry would hide an error.
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0)


@pytest.fixture(scope="session")
def canary(server: Server) -> Canary:
    canary = Canary(server)
    canary.song = canary.sing()
    return canary
