"""vllm-router between a client and the server: our fields and usage pass through, errors and streams too."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import yaml  # type: ignore[import-untyped]
from openai import OpenAI

from benchmarks.serving import Server

COMPOSE = Path(__file__).parents[2] / "deploy/compose.router.yaml"
PROMPT = "The shelf holds books about gardens. " * 60


class ComposeLoader(yaml.SafeLoader):
    """Knows Compose's own tags, which say how files are merged."""


ComposeLoader.add_multi_constructor("!", lambda loader, tag, node: None)


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def router(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """With the arguments of the compose file, and other workers."""
    services = yaml.load(COMPOSE.read_text(), ComposeLoader)["services"]
    policy, flag, _, _, *others = services["router"]["command"]
    assert flag == "--worker-urls"
    port = free_port()
    words = [
        policy,
        flag,
        server.url,
        *others,
        "--host=127.0.0.1",
        f"--port={port}",
        f"--prometheus-port={free_port()}",
    ]
    program = Path(sys.executable).parent / "vllm-router"
    with (tmp_path_factory.mktemp("router") / "log").open("w+") as log:
        process = subprocess.Popen([program, *words], stdout=log, stderr=subprocess.STDOUT)
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + 60
            while True:
                assert process.poll() is None and time.monotonic() < end, Path(log.name).read_text()[-3000:]
                try:
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.wait(20)


@pytest.fixture(scope="module")
def routed(router: str) -> OpenAI:
    return OpenAI(base_url=f"{router}/v1", api_key="none", timeout=120, max_retries=0)


def test_fields_and_usage_pass(routed: OpenAI) -> None:
    model = routed.models.list().data[0].id
    fields = {
        "kv_cache": {"policy": "none"},
        "decode_attention": {"selector": "quest", "tokens": 128, "min_context": 0},
        "prefill_attention": {"pattern": "streaming", "sinks": 128, "window": 128, "min_context": 0},
    }
    answer = routed.chat.completions.create(
        model=model, messages=[{"role": "user", "content": PROMPT}], max_tokens=4, extra_body=fields
    )
    usage = json.loads(answer.model_dump_json())["usage"]
    assert usage["kv_cache"]["policy"] == "none"
    assert usage["decode_attention"]["selector"] == "quest" and usage["decode_attention"]["steps"]["select"] >= 1
    assert usage["prefill_attention"]["density"]["mean"] < 1


def test_streams_pass(routed: OpenAI) -> None:
    parts = routed.completions.create(
        model=routed.models.list().data[0].id,
        prompt=PROMPT,
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"kv_cache": {"policy": "snapkv", "budget": 128}, "ignore_eos": True},
    )
    *texts, last = list(parts)
    assert len(texts) >= 4
    told = json.loads(last.model_dump_json())["usage"]["kv_cache"]
    assert told["policy"] == "snapkv" and told["kept_tokens"]["mean"] < told["prompt_tokens"]


def test_a_refusal_passes_with_its_words(router: str, routed: OpenAI) -> None:
    body = {"model": routed.models.list().data[0].id, "prompt": "a", "kv_cache": {"policy": "snapkv", "budget": 1}}
    answer = httpx.post(f"{router}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "kv_cache.budget"
