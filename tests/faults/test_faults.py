"""What breaks or stops a real server, and what its clients see. The tests share it and run in this order."""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from benchmarks.serving import Server

pytestmark = pytest.mark.e2e
TOKENS = 400


def ask(server: Server, number: int, stream: bool, tokens: int = TOKENS) -> tuple[int, list[Any]]:
    """Status and answer of a completion; of a stream, every event."""
    body = {"model": "tiny", "prompt": f"w7 w8 w{number}", "max_tokens": tokens, "stream": stream}
    body |= {"ignore_eos": True, "skip_special_tokens": False}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    if not stream or response.status_code != 200:
        return response.status_code, [response.json()]
    events = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
    assert events.pop() == "[DONE]"
    return 200, [json.loads(event) for event in events]


def ask_all(server: Server, pool: ThreadPoolExecutor, tokens: int = TOKENS) -> list[Future[tuple[int, list[Any]]]]:
    """Six requests, two of which run and four wait; every other one streams."""
    answers = [pool.submit(ask, server, number, bool(number % 2), tokens) for number in range(6)]
    end = time.monotonic() + 60
    while (server.metric("vllm:num_requests_running"), server.metric("vllm:num_requests_waiting")) != (2, 4):
        assert time.monotonic() < end, "they never ran"
        time.sleep(0.01)
    return answers


def test_a_server_that_is_told_to_stop_loses_no_request(server: Server) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = ask_all(server, pool)
        server.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 10
        while (ready := httpx.get(f"{server.url}/ready")).status_code == 200 and time.monotonic() < end:
            time.sleep(0.01)
        assert (ready.status_code, ready.json()["status"]) == (503, "draining")
        assert httpx.get(f"{server.url}/health").status_code == 200
        refused, [error] = ask(server, 9, True)
        assert (refused, error["error"]["type"], error["error"]["code"]) == (503, "ServiceUnavailableError", 503)
        assert not all(answer.done() for answer in answers)
        for number, answer in enumerate(answers):
            status, events = answer.result()
            choices = [event["choices"][0] for event in events]
            assert (status, choices[-1]["finish_reason"]) == (200, "length"), number
            assert len("".join(choice["text"] for choice in choices).split()) == TOKENS, number
    assert server.process.wait(60) == 0
    assert "requests under way have 25 s to finish" in server.log.read_text()
