"""What breaks or stops a real server, and what its clients see. The tests share it and run in this order."""

from __future__ import annotations

import json
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import psutil
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


def processes(server: Server) -> dict[str, psutil.Process]:
    """The supervisor's descendants by what vLLM calls them, and `server`, its child."""
    below = psutil.Process(server.process.pid).children(recursive=True)
    names = {process.name().removeprefix("VLLM::"): process for process in below}
    return {"server": psutil.Process(server.process.pid).children()[0], **names}


def status(server: Server, path: str) -> int | None:
    """Of a GET; None where nobody listens."""
    try:
        return httpx.get(server.url + path, timeout=10).status_code
    except httpx.TransportError:
        return None


def test_a_killed_engine_is_told_to_its_clients_and_started_again(server: Server) -> None:
    """Times are printed, for docs/faults.md."""
    before = processes(server)
    with ThreadPoolExecutor(8) as pool:
        answers = ask_all(server, pool, 8000)
        before["EngineCore"].kill()
        begin = time.monotonic()
        for number, answer in enumerate(answers):
            told, events = answer.result()
            error = events[-1]["error"]
            assert (told, error["code"]) == (200 if number % 2 else 503, 503)
            assert "Send it again" in error["message"]
        print(f"clients told after {time.monotonic() - begin:.2f} s")
    assert status(server, "/health") in (503, None)  # None: it has ended already
    assert status(server, "/ready") in (503, None)
    while status(server, "/ready") is not None:
        assert time.monotonic() < begin + 60
        time.sleep(0.1)
    print(f"ended after {time.monotonic() - begin:.2f} s")
    while status(server, "/ready") != 200:
        assert time.monotonic() < begin + 300 and server.process.poll() is None
        time.sleep(0.2)
    print(f"serves again after {time.monotonic() - begin:.2f} s")
    assert not any(process.is_running() for process in before.values())
    assert ask(server, 3, False, 5)[0] == 200
    log = server.log.read_text()
    assert "longreach: the engine died; its own messages above say why" in log
    assert "exit code 7 (engine)" in log and "restart 1 of at most 5" in log


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
    below = processes(server)
    assert server.process.wait(60) == 0
    assert not any(process.is_running() for process in below.values())
    assert "requests under way have 25 s to finish" in server.log.read_text()
