"""The passkey benchmark from end to end, against a fake OpenAI server."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import run as quality
from benchmarks.quality.expect import kept_ranges
from benchmarks.quality.passkeys import Tokenizer, count, render


@dataclass
class Fake:
    """An OpenAI server that knows the key under some policies, and keeps what it was asked."""

    tokenizer: Tokenizer
    model_path: Path
    truncate: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def get(self, path: str) -> dict[str, Any]:
        if path == "/version":
            return {"version": "fake-1"}
        assert path == "/v1/models"
        card = {"id": "tiny", "root": str(self.model_path), "max_model_len": 8192, "object": "model", "created": 0}
        return {"object": "list", "data": [{**card, "owned_by": "test"}]}

    def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        self.bodies.append(body)
        content = body["messages"][0]["content"]
        prompt = render(self.tokenizer, content)
        tokens = count(self.tokenizer, prompt)
        cache = body.get("kv_cache", {"policy": "none"})
        match = re.search(r"is (\d{5})\. ", content)
        assert match is not None
        position = count(self.tokenizer, prompt[: prompt.index(match[0])])
        budget = cache.get("budget", tokens)
        knows = cache["policy"] in ("none", "snapkv")
        if cache["policy"] == "streamingllm":
            knows = position > kept_ranges(tokens, budget, 32)[-1][0]
        usage: dict[str, Any] = {"prompt_tokens": 1000 if self.truncate else tokens, "completion_tokens": 9}
        usage["total_tokens"] = usage["prompt_tokens"] + 9
        if cache["policy"] != "ignored":
            held = {"mean": float(budget), "min": budget, "max": budget}
            freed = {"bytes_held": budget * 64, "bytes_freed": (tokens - budget) * 64}
            usage["kv_cache"] = {"policy": cache["policy"], "prompt_tokens": tokens, "kept_tokens": held, **freed}
        text = f"The key is {match[1]}." if knows else "I do not know."
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "tiny",
            "choices": [choice],
            "usage": usage,
        }


@pytest.fixture
def fake(tokenizer: Tokenizer, model_path: Path) -> Iterator[Fake]:
    served = Fake(tokenizer, model_path)

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.reply(200, served.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if body.get("kv_cache", {}).get("policy") == "unknown":
                self.reply(400, {"error": {"message": "no such policy", "type": "BadRequestError", "code": 400}})
            else:
                self.reply(200, served.chat(body))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        served.url = f"http://127.0.0.1:{httpd.server_port}/v1"
        yield served
        httpd.shutdown()


def go(fake: Fake, out: Path, policies: str, *rest: str) -> int:
    fixed = ["--base-url", fake.url, "--tokens", "1500", "--documents", "8", "--out", str(out)]
    return quality.main([*fixed, "--api-key", "secret", "--policies", *policies.split(), *rest])


def test_run_against_a_server(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policies = "none snapkv:256,window=16 streamingllm:256 random:256"
    expectations = ["none==8", "snapkv==8", "random<snapkv", "streamingllm==window"]
    assert go(fake, tmp_path, policies, "--concurrency", "3", "--expect", *expectations) == 0
    printed = capsys.readouterr().out
    assert " 8/8 |" in printed and " 0/8 |" in printed and "all 4 expectations hold" in printed
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["failures"] == [] and results["model"] == "tiny" and results["versions"]["server"] == "fake-1"
    assert "secret" not in results["command"] and "snapkv:256,window=16" in results["command"]
    assert [(row["policy"], row["document"]) for row in results["rows"]] == [
        (policy, document) for policy in policies.split() for document in range(8)
    ]
    assert all(row["prompt_tokens"] == row["meant_tokens"] for row in results["rows"])
    assert results["rows"][8]["kv_cache"]["kept_tokens"] == {"mean": 256.0, "min": 256, "max": 256}
    assert 0 < results["summary"][2]["found"] < 8
    assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert len(fake.bodies) == 32
    assert len({json.dumps(body["messages"]) for body in fake.bodies}) == 8
    caches = [body["kv_cache"] for body in fake.bodies]
    assert caches[0] == {"policy": "none"}
    assert caches[8] == {"policy": "snapkv", "budget": 256, "window": 16}
    assert {(body["temperature"], body["max_tokens"], body["model"]) for body in fake.bodies} == {(0.0, 24, "tiny")}


@pytest.mark.parametrize(
    ("policies", "rest", "message"),
    [
        ("none random:9", ["--expect", "random>=1"], "random>=1: random:9 found 0"),
        ("ignored:9", [], "the server ignored the policy"),
        ("unknown:9", [], "no such policy"),
    ],
)
def test_run_names_what_failed(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str], policies: str, rest: list[str], message: str
) -> None:
    assert go(fake, tmp_path, policies, *rest) == 1
    assert message in capsys.readouterr().err


def test_truncated_prompts_never_count_as_found(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake.truncate = True
    assert go(fake, tmp_path, "none") == 1
    assert "usage.prompt_tokens is 1000" in capsys.readouterr().err
    assert json.loads((tmp_path / "results.json").read_text())["summary"][0]["found"] == 0


@pytest.mark.parametrize(
    "rest", [["--timeout", "30"], ["--tokens", "8190"], ["--model", "other"], ["--expect", "h2o>=1"], ["--depths", "0"]]
)
def test_wrong_arguments_stop_before_any_request(fake: Fake, tmp_path: Path, rest: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        go(fake, tmp_path, "none", *rest)
    assert stop.value.code == 2 and fake.bodies == []


def test_client_has_our_timeout_and_never_repeats(fake: Fake) -> None:
    client, card = quality.connect(fake.url, "none", 1234.0, None)
    assert (client.timeout, client.max_retries, card["id"]) == (1234.0, 0, "tiny")
