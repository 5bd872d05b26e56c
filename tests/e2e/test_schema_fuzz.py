"""schemathesis over the server's own OpenAPI schema: no answer is a 5xx, and none fails to come."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.core.result import Ok

from benchmarks.serving import Server
from tests.e2e.canary import Canary

EXAMPLES = 4
"""Requests for each operation and mode."""
SECONDS = 60
"""Longest wait for an answer."""
EXCLUDED = {
    ("POST", "/v1/systemone", 501): "vLLM's word for 'this model has no such API'; nothing was tried",
}
"""5xx answers of vLLM's that stay: method, path, status; and why."""
SHORT = {"max_tokens": 1, "max_completion_tokens": 1, "max_output_tokens": 1, "n": 1, "min_tokens": 0, "beam_width": 1}
"""What would only make an answer long: a request may ask for 8,192 tokens, which isn't bad input. Put where the fuzz
left a request without a limit or put one of its own; text in their place is still sent as it is."""


def shortened(case: Case) -> None:
    if case.method == "POST" and isinstance(case.body, dict):
        needed = {"max_output_tokens" if case.path == "/v1/responses" else "max_tokens"}
        for name in (needed | set(case.body)) & set(SHORT):
            if isinstance(case.body.get(name), int | float | None):
                case.body[name] = SHORT[name]


RUN = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def operations(server: Server) -> list[Any]:
    schema = schemathesis.openapi.from_dict(json.loads(server.get("/openapi.json")))
    found = list(schema.get_all_operations())
    assert all(isinstance(each, Ok) for each in found), found
    return [each.ok() for each in found if isinstance(each, Ok)]


def test_no_request_of_the_schema_is_answered_by_5xx(server: Server, canary: Canary) -> None:
    answered: dict[int, int] = {}
    with httpx.Client(base_url=server.url, timeout=SECONDS) as client:

        def send(case: Case) -> None:
            shortened(case)
            words = case.as_transport_kwargs(base_url=server.url)
            words.pop("cookies", None)
            try:
                response = client.request(**words)
            except httpx.TransportError as failed:
                raise AssertionError(f"{failed!r}: {case.as_curl_command()}") from failed
            answered[response.status_code] = answered.get(response.status_code, 0) + 1
            known = (case.method, case.path, response.status_code) in EXCLUDED
            assert response.status_code < 500 or known, f"{case.as_curl_command()}\n{response.text}"

        for operation in operations(server):
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                strategy = operation.as_strategy(generation_mode=mode)
                with suppress(Unsatisfiable):  # nothing in a GET without parameters can be wrong
                    RUN(given(strategy)(lambda case: send(case)))()
    assert answered.get(200, 0) > 10 and answered.get(400, 0) > 50, "too few requests got anywhere"
    canary.check()
