"""Bad input over HTTP: what is answered, and that the engine is alive and right afterwards.

docs/bad-input.md has a row for each entry of `BODIES` and each test; tests/docs compares them.
"""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks.serving import Server
from tests.e2e.canary import Canary

MODEL = "SmolLM2-135M-Instruct"
TURN = [{"role": "user", "content": "TEXT"}]
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "TEXT", "max_tokens": 1},
    "/v1/chat/completions": {"messages": TURN, "max_tokens": 1},
    "/v1/chat/completions/batch": {"messages": [TURN], "max_tokens": 1},
    "/v1/responses": {"input": "TEXT", "max_output_tokens": 1},
    "/v1/messages": {"messages": TURN, "max_tokens": 1, "model": MODEL},
    "/invocations": {"prompt": "TEXT", "max_tokens": 1},
    "/tokenize": {"prompt": "TEXT"},
    "/v1/messages/count_tokens": {"messages": TURN, "model": MODEL},
}
"""Everything that takes a text, each with a request for it."""
GENERATING = [route for route in ROUTES if "token" not in route]
WORDS = {"content-type": "application/json"}


def body(route: str, text: str = "Hi", more: str = "") -> bytes:
    """A request; `more` is JSON text of further fields, written as it is."""
    content = json.dumps(ROUTES[route]).replace('"TEXT"', text if text.startswith('"') else json.dumps(text))
    return (content[:-1] + (f", {more}}}" if more else "}")).encode()


LONG = "a " * 340_000  # more characters than 8,192 tokens of this vocabulary can have
OVER = "one two three " * 4000  # fewer, but still too many tokens
BODIES: dict[str, tuple[Any, int, str]] = {
    "broken JSON": (lambda route: body(route)[:-1], 400, "isn't JSON"),
    "no object": (lambda route: b"[1]", 400, ""),
    "broken UTF-8": (lambda route: body(route).replace(b"Hi", b"\xff\xfe"), 400, "isn't UTF-8"),
    "half of a surrogate pair": (lambda route: body(route, '"\\ud800"'), 400, "half of a surrogate pair"),
    "NaN": (lambda route: body(route, more='"temperature": NaN'), 400, "NaN is no number"),
    "Infinity": (lambda route: body(route, more='"top_p": -Infinity'), 400, "Infinity is no number"),
    "a number larger than a float": (lambda route: body(route, more='"temperature": 1e999'), 400, "too large"),
    "a number of 5,000 digits": (lambda route: body(route, more=f'"seed": {"9" * 5000}'), 400, "too many digits"),
    "lists 65 deep": (lambda route: body(route, more=f'"x": {"[" * 64}{"]" * 64}'), 400, "nested too deep"),
    "lists 100,000 deep": (lambda route: body(route, more=f'"x": {"[" * 10**5}{"]" * 10**5}'), 400, "nested too deep"),
    "a body of 5 MB": (lambda route: body(route, "x" * 5_000_000), 413, "--max-body-bytes"),
}
"""By name: a body for a route, the status of the answer, and a part of its message."""


def error(answer: httpx.Response) -> str:
    """The message, in OpenAI's or Anthropic's shape."""
    return str(answer.json()["error"]["message"])


@pytest.mark.parametrize("name", BODIES)
def test_bodies(name: str, server: Server) -> None:
    make, status, message = BODIES[name]
    for route in ROUTES:
        answer = httpx.post(server.url + route, content=make(route), headers=WORDS, timeout=60)
        assert (answer.status_code, message in error(answer)) == (status, True), (route, answer.text[:500])


def raw(server: Server) -> socket.socket:
    parts = urlsplit(server.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=60)


def request(route: str, content: bytes, *more: bytes) -> bytes:
    head = [f"POST {route} HTTP/1.1".encode(), b"host: x", b"content-type: application/json", *more]
    return b"\r\n".join([*head, f"content-length: {len(content)}".encode(), b"", content])


def test_a_body_without_length_is_cut_off_where_it_is_too_large(server: Server) -> None:
    """It is answered before it has ended, which it never does."""
    for route in ROUTES:
        with raw(server) as sock:
            sock.sendall(f"POST {route} HTTP/1.1\r\nhost: x\r\n".encode())
            sock.sendall(b"content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
            for _ in range(80):
                sock.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            assert sock.recv(1000).startswith(b"HTTP/1.1 413"), route


def test_a_text_that_cannot_fit_is_refused_by_its_length(server: Server) -> None:
    """Before it is tokenised: a token of a vocabulary has at most so many characters."""
    for route in GENERATING:
        answer = httpx.post(server.url + route, content=body(route, LONG), headers=WORDS, timeout=60)
        assert (answer.status_code, "upper bound for 8192 input tokens" in error(answer)) == (400, True), answer.text


def test_a_prompt_over_the_limit_is_refused(server: Server) -> None:
    for route in GENERATING:
        answer = httpx.post(server.url + route, content=body(route, OVER), headers=WORDS, timeout=60)
        assert (answer.status_code, "maximum context length" in error(answer)) == (400, True), answer.text


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.sampled_from(["snapkv", "quest", "xattention", "none", "dense", "25%", "-1%", "1e9%"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def near(name: str, methods: list[dict[str, Any]]) -> st.SearchStrategy[Any]:
    """Objects that name a method, some of its arguments with junk in them, and now and then one that it hasn't."""

    def words(method: dict[str, Any]) -> st.SearchStrategy[Any]:
        known = list(method.get("arguments", {}).get("properties", {})) or ["budget"]
        fields = st.sampled_from([*known, *known, "nonsense"])
        return st.dictionaries(fields, JUNK, max_size=3).map(lambda args: {name: method["name"], **args})

    return st.sampled_from(methods).flatmap(words)


def methods(server: Server, path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(server.get(path))["data"]
    return found


def test_fuzzed_fields_are_answered_by_200_or_400(server: Server, canary: Canary) -> None:
    fields = {
        "kv_cache": JUNK | near("policy", methods(server, "/v1/kv/policies")),
        "decode_attention": JUNK | near("selector", methods(server, "/v1/decode/selectors")),
        "prefill_attention": JUNK | near("pattern", methods(server, "/v1/prefill/patterns")),
    }
    seen: set[int] = set()
    with httpx.Client(base_url=server.url, timeout=60) as client:

        def send(route: str, words: dict[str, Any]) -> None:
            content = {**json.loads(body(route)), **words}
            answer = client.post(route, json=content)
            seen.add(answer.status_code)
            assert answer.status_code in (200, 400), (content, answer.text)
            if answer.status_code == 400:
                told = answer.json()["error"]
                assert told["param"].partition(".")[0] in words and told["message"] and told["code"] == 400, answer.text

        routes = st.sampled_from(list(ROUTES))
        run = settings(max_examples=150, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                       suppress_health_check=list(HealthCheck))  # fmt: skip
        run(given(routes, st.fixed_dictionaries({}, optional=fields))(lambda route, words: send(route, words)))()
    assert seen == {200, 400}
    canary.check()


def test_giant_headers(server: Server) -> None:
    for field in (b"x: " + b"y" * 70_000, b"\r\n".join(b"x: y" for _ in range(300)), b"authorization: " + b"z" * 10**6):
        with raw(server) as sock:
            try:
                sock.sendall(request("/v1/completions", b"{}", field))
                told = sock.recv(65536)
            except (BrokenPipeError, ConnectionResetError):
                continue  # closed while a megabyte was on its way
            assert told.startswith(b"HTTP/1.1 431"), told


STREAM = {"prompt": "Once upon a time", "max_tokens": 3000, "ignore_eos": True, "stream": True}


@pytest.mark.parametrize("how", [socket.SHUT_WR, socket.SHUT_RDWR], ids=["half-closed", "closed"])
def test_streams_that_the_client_closes(how: int, server: Server, canary: Canary) -> None:
    """The request ends, and gives its memory back."""
    with raw(server) as sock:
        sock.sendall(request("/v1/completions", json.dumps(STREAM).encode()))
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
        end = time.monotonic() + 20
        while not server.metric("vllm:num_requests_running"):
            assert time.monotonic() < end
            time.sleep(0.1)
        sock.shutdown(how)
        server.wait_until_empty(20)  # 3,000 tokens would take minutes
    canary.check()


def test_bodies_that_never_end_are_no_requests(server: Server, canary: Canary) -> None:
    content = body("/v1/completions")
    with ExitStack() as stack:
        for part in (content[:5], content[:-1]):
            sock = stack.enter_context(raw(server))
            sock.sendall(request("/v1/completions", content)[: -len(content)] + part)
        canary.check()
    canary.check()


def test_a_thousand_idle_connections(server: Server, canary: Canary) -> None:
    """Some say nothing, some have begun a head, some have had an answer; others are served meanwhile."""
    begun = [b"", b"GET /health HTTP/1.1\r\nhost:", b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"]
    with ExitStack() as stack:
        for place in range(1000):
            stack.enter_context(raw(server)).sendall(begun[place % 3])
        canary.check()
