"""Keys on a real server: who is let in, what is counted, and that no secret is in its log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AuthenticationError, OpenAI, RateLimitError

from benchmarks.serving import Server, running_server
from server.access.keys import new_key

MODEL = "SmolLM2-135M-Instruct"
TEXT = "The library has many shelves with books about gardens, rivers and stars. " * 20


@dataclass
class Guarded:
    server: Server
    file: Path
    secrets: dict[str, str]

    def add(self, name: str, **limits: Any) -> None:
        self.secrets[name], key = new_key(name, **limits)
        with self.file.open("a") as file:
            file.write(key.line() + "\n")

    def client(self, secret: str) -> OpenAI:
        return OpenAI(base_url=f"{self.server.url}/v1", api_key=secret, timeout=120, max_retries=0)

    def ask(self, name: str, prompt: str = TEXT) -> Any:
        client = self.client(self.secrets[name])
        return client.completions.create(model=MODEL, prompt=prompt, max_tokens=4, temperature=0).usage

    def metrics(self) -> dict[str, float]:
        headers = {"authorization": f"Bearer {self.secrets['prometheus']}"}
        told = httpx.get(f"{self.server.url}/metrics", headers=headers).text
        rows = [line.rpartition(" ") for line in told.splitlines() if line.startswith("longreach_key_")]
        return {name: float(value) for name, _, value in rows}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    guarded = Guarded(None, folder / "keys.txt", {})  # type: ignore[arg-type]
    guarded.add("alice")
    guarded.add("bob", own_cache=True)
    guarded.add("slow", requests=1)
    guarded.add("prometheus", areas=("metrics",))
    flags = ["--api-key-file", str(guarded.file), "--kv-cache-memory-bytes", "300000000", "--enable-log-requests",
             "--enable-prompt-tokens-details"]  # fmt: skip
    with running_server(folder / "log", *flags) as guarded.server:
        yield guarded


def test_requests_are_counted_by_key(guarded: Guarded) -> None:
    usage = guarded.ask("alice")
    with guarded.client(guarded.secrets["alice"]).completions.create(
        model=MODEL, prompt=TEXT, max_tokens=4, temperature=0, stream=True
    ) as stream:
        assert list(stream)
    told = guarded.metrics()
    assert told['longreach_key_tokens_total{key="alice",kind="prompt"}'] == 2 * usage.prompt_tokens
    assert told['longreach_key_tokens_total{key="alice",kind="generated"}'] == 2 * usage.completion_tokens == 8
    assert told['longreach_key_requests_total{answer="let in",key="alice"}'] == 2
    assert told['longreach_key_requests_running{key="alice"}'] == 0


def test_limits_and_wrong_keys(guarded: Guarded) -> None:
    guarded.ask("slow", "Hi")
    with pytest.raises(RateLimitError) as limited:
        guarded.ask("slow", "Hi")
    assert 1 <= int(limited.value.response.headers["retry-after"]) <= 60
    for secret in ("lr-not-a-key", guarded.secrets["alice"][:-1]):
        with pytest.raises(AuthenticationError):
            guarded.client(secret).models.list()
    for path in ("/metrics", "/tokenize", "/invocations", "/openapi.json"):
        assert httpx.get(guarded.server.url + path).status_code == 401, path


def test_a_cache_of_its_own(guarded: Guarded) -> None:
    """Whether somebody else has sent a prompt can be told by its time, unless a key shares no prefix."""

    def cached(name: str) -> int:
        details = guarded.ask(name, "Secret: " + TEXT).prompt_tokens_details
        return int(details.cached_tokens) if details else 0

    assert [cached("alice"), cached("bob")] == [0, 0]
    assert cached("alice") > 0 and cached("bob") > 0


def test_a_key_that_is_added_works_without_a_restart(guarded: Guarded) -> None:
    guarded.add("late")
    end = time.monotonic() + 10
    while httpx.get(f"{guarded.server.url}/v1/models",
                    headers={"x-api-key": guarded.secrets["late"]}).status_code != 200:  # fmt: skip
        assert time.monotonic() < end
        time.sleep(0.2)


def test_no_secret_is_in_the_log(guarded: Guarded) -> None:
    """The last of these tests. The log has requests, arguments and every refusal."""
    log = guarded.server.log.read_text(errors="replace")
    assert "api_key_file" in log or "/v1/completions" in log
    for name, secret in guarded.secrets.items():
        assert secret not in log and secret[3:20] not in log, name
    for line in guarded.file.read_text().splitlines():
        assert line.split()[1].removeprefix("sha256:")[:16] not in log
    assert "lr-not-a-key" not in log
