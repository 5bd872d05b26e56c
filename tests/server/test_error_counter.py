"""Which answers count as errors, and as which."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from server.error_counter import UNCOUNTED, ErrorCounter
from server.metrics import ErrorMetrics
from server.scope import FIELDS


def answered(status: int, *parts: bytes, path: str = "/v1/completions") -> tuple[dict[tuple[str, str], float], bytes]:
    """What is counted of an answer in these parts, without what is zero; and what the client gets."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if status:
            await send({"type": "http.response.start", "status": status, "headers": []})
        for part in parts:
            await send({"type": "http.response.body", "body": part, "more_body": part is not parts[-1]})
        if not status:
            raise RuntimeError("a bug")

    got: list[bytes] = []

    async def send(message: Any) -> None:
        got.append(message.get("body", b""))

    async def receive() -> Any:
        return {"type": "http.request"}

    registry = CollectorRegistry()
    counter = ErrorCounter(app, ErrorMetrics(FIELDS, registry))
    try:
        asyncio.run(counter({"type": "http", "path": path}, receive, send))
    except RuntimeError:
        assert not status
    samples = [sample for family in registry.collect() for sample in family.samples if sample.name.endswith("_total")]
    counted = {(sample.labels["code"], sample.labels["field"]): sample.value for sample in samples if sample.value}
    return counted, b"".join(got)


def error(**fields: Any) -> bytes:
    return json.dumps({"error": {"message": "no", "type": "BadRequestError", **fields}}).encode()


def test_a_refusal_counts_by_status_and_field_and_passes_through() -> None:
    body = error(param="kv_cache.budget", code=400)
    assert answered(400, body[:20], body[20:]) == ({("400", "kv_cache"): 1}, body)


@pytest.mark.parametrize(
    "body", [error(param="temperature"), error(param=None), b"<html>", b"", b'{"error": "x"}', b"[]"]
)
def test_other_errors_count_by_status(body: bytes) -> None:
    assert answered(429, body)[0] == {("429", ""): 1}


def test_an_answer_counts_nothing() -> None:
    assert answered(200, b'{"usage": {}}')[0] == {}
    quoted = json.dumps({"text": '\ndata: {"error": {"code": 500}}'}).encode()
    assert answered(200, b"data: " + quoted + b"\n\n", b"data: [DONE]\n\n")[0] == {}


@pytest.mark.parametrize(
    "line, counted",
    [
        (b"data: " + error(code=400, param="prefill_attention"), ("400", "prefill_attention")),
        (b'event: error\ndata: {"type":"error","error":{"type":"internal","message":"no"}}', ("500", "")),
    ],
)
def test_an_error_in_a_stream_counts_by_its_own_code(line: bytes, counted: tuple[str, str]) -> None:
    assert answered(200, b'data: {"text": "a"}\n\n', line + b"\n\n", b"data: [DONE]\n\n")[0] == {counted: 1}


def test_an_exception_is_the_500_that_it_becomes() -> None:
    assert answered(0)[0] == {("500", ""): 1}


@pytest.mark.parametrize("path", UNCOUNTED)
def test_what_monitoring_asks_is_no_request(path: str) -> None:
    assert answered(503, b"", path=path)[0] == {}
