"""A request whose answer is known: after anything that a client did, the engine has to be alive and right."""

from __future__ import annotations

from dataclasses import dataclass

import httpx

from benchmarks.serving import Server


@dataclass
class Canary:
    server: Server
    song: str = ""

    def sing(self) -> str:
        """A deterministic answer of 12 tokens."""
        request = {"prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}
        answer = httpx.post(f"{self.server.url}/v1/completions", json=request, timeout=120)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def check(self) -> None:
        """The same answer as at the beginning, an empty pool, and `/health` is green."""
        assert self.sing() == self.song
        self.server.get("/health")
        self.server.wait_until_empty()
