"""An endpoint that streams made-up tokens as slowly as it is told, and tells /metrics; also a command of its own.

python fake.py [--host 127.0.0.1] --port PORT [--kv-cache-memory-bytes BYTES]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route


@dataclass
class Fake:
    """What it was asked is in `bodies`, in order. Delays are seconds.

    Attributes:
        first, step: before the first token, and before each other one.
        places: requests that it works on at once; others wait, and have no token.
        stops_after: tokens of an answer at most.
        log: of begins and ends, by the prompt's length.
    """

    first: float = 0.0
    step: float = 0.0
    places: int = 1000
    stops_after: int = 10**9
    longreach: bool = True
    max_model_len: int = 8192
    pool: int = 64_000
    bodies: list[dict[str, Any]] = field(default_factory=list)
    log: list[tuple[str, int]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    cut: int = 0
    url: str = ""
    free: asyncio.Semaphore | None = None

    def app(self) -> Starlette:
        routes = [
            Route("/v1/models", self.models), Route("/metrics", self.metrics), Route("/health", self.health),
            Route("/v1/completions", self.complete, methods=["POST"]),
        ]  # fmt: skip
        if self.longreach:
            routes.append(Route("/v1/kv/policies", self.policies))
        return Starlette(routes=routes)

    async def health(self, _: Request) -> Response:
        return JSONResponse({})

    async def policies(self, _: Request) -> Response:
        return JSONResponse({"policies": ["none", "snapkv"]})

    async def models(self, _: Request) -> Response:
        return JSONResponse({"data": [{"id": "tiny", "max_model_len": self.max_model_len}]})

    async def metrics(self, _: Request) -> Response:
        lines = [
            f'vllm:num_requests_running{{engine="0"}} {self.running}',
            'vllm:num_requests_waiting{engine="0"} 0', 'vllm:kv_cache_usage_perc{engine="0"} 0.5',
            f'vllm:cache_config_info{{block_size="16",num_gpu_blocks="{self.pool // 16}"}} 1.0',
        ]  # fmt: skip
        return PlainTextResponse("\n".join(lines) + "\n")

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        policy = body.get("kv_cache", {}).get("policy", "none")
        if policy == "unknown":
            error = {"message": "kv_cache.policy: there is no 'unknown'", "type": "BadRequestError", "code": 400}
            return JSONResponse({"error": error}, 400)
        tokens = min(body["max_tokens"], self.stops_after)
        usage: dict[str, Any] = {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens}
        if self.longreach:
            usage["kv_cache"] = {"policy": policy}
        if not body.get("stream"):
            return JSONResponse({"choices": [{"text": "", "finish_reason": "length"}], "usage": usage})
        return StreamingResponse(self.stream(len(body["prompt"]), tokens, usage), media_type="text/event-stream")

    async def stream(self, length: int, tokens: int, usage: dict[str, Any]) -> AsyncIterator[str]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.log.append(("begin", length))
        self.free = self.free or asyncio.Semaphore(self.places)
        try:
            async with self.free:
                for number in range(tokens):
                    await asyncio.sleep(self.step if number else self.first)
                    yield _event({"choices": [{"index": 0, "text": ""}]})
            yield _event({"choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
            self.log.append(("end", length))
        except asyncio.CancelledError:
            self.cut += 1
            raise
        finally:
            self.running -= 1


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


@contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    """The fake on a free port of loopback."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(fake.app(), log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    fake.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join(10)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=64_000)
    options = parser.parse_args()
    uvicorn.run(Fake(pool=options.kv_cache_memory_bytes).app(), host=options.host, port=options.port, log_level="error")
