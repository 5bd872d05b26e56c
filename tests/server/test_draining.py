"""Requests under way finish when the server is told to stop; new ones are refused."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import RetryableRequestError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from server import engine as engine_module
from server.draining import RETRY_AFTER, Door, DrainingMiddleware
from server.engine import LongreachLLM
from tests.server.asgi import answer, http_scope, sent_body

NEVER = 3600.0


def cut_nothing() -> None:
    raise AssertionError("nothing was there to cut")


def closed_soon(door: Door, seconds: float, cut: Callable[[], None] = cut_nothing) -> list[bool]:
    """Drain in a thread, as vLLM stops its engine; the list has the result once it ends."""
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(door.drain(seconds, cut)), daemon=True)
    thread.start()
    while not door.closed:
        time.sleep(0.001)
    return results


def until(results: list[bool]) -> bool:
    end = time.monotonic() + 10
    while not results:
        assert time.monotonic() < end, "still waiting"
        time.sleep(0.001)
    return results[0]


def test_an_empty_server_stops_at_once() -> None:
    assert Door().drain(NEVER, cut_nothing)


def test_it_waits_for_the_last_request() -> None:
    door = Door()
    door.enter()
    door.enter()
    results = closed_soon(door, NEVER)
    door.leave()
    time.sleep(0.05)
    assert not results
    door.leave()
    assert until(results)


def test_what_takes_too_long_is_cut_and_told_so() -> None:
    door, cuts = Door(), []
    door.enter()

    def cut() -> None:
        cuts.append(door.under_way)
        door.leave()

    assert not door.drain(0.01, cut)
    assert (cuts, door.under_way, door.hurried) == ([1], 0, False)


def test_a_second_signal_ends_the_wait() -> None:
    """As `kill` twice or a second Ctrl-C send it, to the event loop's own handlers."""

    async def run() -> bool:
        loop = asyncio.get_running_loop()
        door = Door(loop)
        door.enter()
        try:
            stopped = loop.run_in_executor(None, door.drain, NEVER, door.leave)
            while not door.closed:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            assert not stopped.done()
            signal.raise_signal(signal.SIGINT)
            return await asyncio.wait_for(stopped, 10)
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            loop.remove_signal_handler(signal.SIGTERM)

    assert not asyncio.run(run())


def ask(door: Door, method: str = "POST", within: Callable[[], None] | None = None) -> list[dict[str, Any]]:
    """What a client is sent whose request meets this door."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if within:
            within()
        for message in answer(b"{}"):
            await send(message)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {**http_scope(method), "app": SimpleNamespace(state=SimpleNamespace(longreach_door=door))}
    asyncio.run(DrainingMiddleware(app)(scope, None, send))  # type: ignore[arg-type]
    return sent


def test_a_request_counts_from_its_first_header_to_its_last_byte() -> None:
    door = Door()
    seen: list[int] = []
    assert ask(door, within=lambda: seen.append(door.under_way))[0]["status"] == 200
    ask(door, "GET", lambda: seen.append(door.under_way))
    assert (seen, door.under_way) == ([1, 0], 0)


def test_a_request_that_fails_leaves() -> None:
    door = Door()

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ask(door, within=fail)
    assert door.under_way == 0


def test_a_closed_door_refuses_as_openai_does_but_shows_metrics() -> None:
    door = Door()
    door.drain(0, cut_nothing)
    start, body = ask(door)
    headers = {name.decode(): text.decode() for name, text in start["headers"]}
    assert (start["status"], headers["retry-after"], headers["connection"]) == (503, str(RETRY_AFTER), "close")
    error = json.loads(sent_body([body]))["error"]
    assert (error["type"], error["code"], error["param"]) == ("ServiceUnavailableError", 503, None)
    assert "stopping" in error["message"]
    assert ask(door, "GET")[0]["status"] == 200


class StoppedEngine(LongreachLLM):
    """Without a model: what vLLM does at its end is noted."""

    def __init__(self, dead: bool = False) -> None:
        self.output_handler = None
        self.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_dead=dead), shutdown=lambda timeout: None)
        self.output_processor = SimpleNamespace(propagate_error=self.told)
        self.errors: list[Exception] = []

    def told(self, error: Exception) -> None:
        """vLLM gives it to every request, which leaves with it."""
        self.errors.append(error)
        assert self.door
        self.door.leave()


def test_the_engine_waits_once_and_then_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    stops: list[Any] = []
    monkeypatch.setattr(AsyncLLM, "shutdown", lambda self, timeout=None: stops.append(timeout))
    engine = StoppedEngine()
    engine.shutdown(timeout=NEVER)  # before it serves
    engine.door = Door()
    engine.shutdown(timeout=NEVER)
    assert (engine.drained, stops) == (True, [0, 0])
    engine.door.enter()
    engine.shutdown(timeout=NEVER)
    assert len(stops) == 3


def test_a_dead_engine_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncLLM, "shutdown", lambda self, timeout=None: None)
    engine = StoppedEngine(dead=True)
    engine.door = Door()
    engine.door.enter()
    engine.shutdown(timeout=NEVER)
    assert engine.drained is None


def test_the_engine_ends_requests_whose_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncLLM, "shutdown", lambda self, timeout=None: None)

    async def run() -> StoppedEngine:
        engine = StoppedEngine()
        loop = asyncio.get_running_loop()
        engine.door = Door(loop)
        engine.door.enter()
        try:
            await asyncio.to_thread(engine.shutdown, 0.01)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
        return engine

    engine = asyncio.run(run())
    assert [type(error) for error in engine.errors] == [EngineDeadError]
    assert engine.drained is False


@pytest.mark.parametrize(
    ("closed", "words"), [(False, "engine died .* once restarted"), (True, "is stopping.* another server")]
)
def test_clients_are_told_to_send_their_requests_again(closed: bool, words: str) -> None:
    """After what they got already; as a 503 or, in a stream, an event with code 503."""
    door, got = Door(), []
    door.closed = closed

    async def outputs() -> Any:
        yield "a token"
        raise EngineDeadError

    async def run() -> None:
        async for output in engine_module._clear(outputs(), door):
            got.append(output)

    with pytest.raises(RetryableRequestError, match=words) as caught:
        asyncio.run(run())
    assert (got, caught.value.status_code) == (["a token"], 503)
