"""Clients that don't behave, on real sockets: uvicorn with our connections around a small application."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import uvicorn

from server.connections import guarded
from server.limits import Limits
from tests.server.asgi import answer

LIMITS = Limits(body_bytes=1000, header_bytes=4096, header_count=20, client_seconds=0.6)
GET = b"GET / HTTP/1.1\r\nhost: x\r\n"
Connect = Callable[[], socket.socket]
served: list[str] = []


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers at once; `/slow` after a second, `/large` with 64 MB in 64 parts."""
    served.append(scope["path"])
    if scope["path"] == "/slow":
        await asyncio.sleep(1)
    parts = [b"x" * 1_000_000] * 64 if scope["path"] == "/large" else [b"xx"]
    size = str(sum(map(len, parts)))
    await send(answer(b"", content_length=size)[0])
    for place, part in enumerate(parts, 1):
        await send({"type": "http.response.body", "body": part, "more_body": place < len(parts)})
    served.append("done")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        config = uvicorn.Config(app, http=guarded(LIMITS), lifespan="off", log_level="error", timeout_keep_alive=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([sock])))
        thread.start()
        yield sock.getsockname()[1]
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def connect(port: int) -> Iterator[Connect]:
    served.clear()
    with ExitStack() as stack:
        yield lambda: stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))


def rest(sock: socket.socket) -> bytes:
    """What comes until the server closes."""
    parts = []
    try:
        while part := sock.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def one_answer(sock: socket.socket) -> bytes:
    """The application's, to its end."""
    told = b""
    while not told.endswith(b"xx"):
        part = sock.recv(1000)
        assert part, told
        told += part
    return told


def test_a_request_is_answered_and_the_connection_kept(connect: Connect) -> None:
    sock = connect()
    for _ in range(3):
        sock.sendall(GET + b"\r\n")
        assert one_answer(sock).startswith(b"HTTP/1.1 200 OK")
        time.sleep(0.3)
    assert rest(sock) == b""  # uvicorn's own, after a second


def test_a_connection_that_says_nothing_is_closed(connect: Connect) -> None:
    assert rest(connect()) == b""


def test_a_head_that_comes_too_slowly_is_answered_by_408(connect: Connect) -> None:
    sock = connect()
    sock.sendall(GET)
    end = time.monotonic() + 5
    try:
        while time.monotonic() < end:
            sock.sendall(b"x: y\r\n")
            time.sleep(0.2)
    except (BrokenPipeError, ConnectionResetError):
        pass
    assert time.monotonic() < end and served == []


def test_the_slow_client_is_told(connect: Connect) -> None:
    sock = connect()
    sock.sendall(GET)
    told = rest(sock)
    assert told.startswith(b"HTTP/1.1 408 Request Timeout") and b'"type":"RequestTimeoutError"' in told


def test_a_second_head_has_its_time_too(connect: Connect) -> None:
    sock = connect()
    sock.sendall(GET + b"\r\n")
    assert one_answer(sock).startswith(b"HTTP/1.1 200")
    sock.sendall(GET)
    assert rest(sock).startswith(b"HTTP/1.1 408")
    assert served == ["/", "done"]


@pytest.mark.parametrize(
    "head",
    [
        GET + b"x: " + b"y" * 5000 + b"\r\n\r\n",
        GET + b"x: y\r\n" * 20 + b"\r\n",
        b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        GET + b"".join(b"x%d: %s\r\n" % (i, b"y" * 400) for i in range(12)) + b"\r\n",
    ],
    ids=["one-field", "many-fields", "path", "together"],
)
def test_a_head_that_is_too_large_is_answered_by_431(head: bytes, connect: Connect) -> None:
    sock = connect()
    sock.sendall(head)
    told = rest(sock)
    assert told.startswith(b"HTTP/1.1 431 Request Header Fields Too Large") and b"HeadersTooLargeError" in told
    assert served == []


def test_a_head_without_end_is_not_collected(connect: Connect) -> None:
    sock = connect()
    sock.sendall(GET + b"x: ")
    time.sleep(0.1)
    sock.sendall(b"y" * 5000)
    assert rest(sock).startswith(b"HTTP/1.1 431")
    assert served == []


def test_an_answer_may_take_its_time(connect: Connect) -> None:
    sock = connect()
    sock.sendall(GET.replace(b" / ", b" /slow ") + b"\r\n")
    assert one_answer(sock).startswith(b"HTTP/1.1 200 OK")


def test_a_body_that_nobody_wants_ends(connect: Connect) -> None:
    """The application answers without reading, as to a wrong key; the client sends on, and is cut off."""
    sock = connect()
    sock.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
    assert one_answer(sock).startswith(b"HTTP/1.1 200 OK")
    end = time.monotonic() + 5
    try:
        while time.monotonic() < end:
            sock.sendall(b"x" * 100)
            time.sleep(0.2)
    except (BrokenPipeError, ConnectionResetError):
        pass
    assert time.monotonic() < end


def test_a_client_that_does_not_read_is_cut_off(connect: Connect) -> None:
    sock = connect()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.sendall(GET.replace(b" / ", b" /large ") + b"\r\n")
    end = time.monotonic() + 8
    while "done" not in served and time.monotonic() < end:
        time.sleep(0.05)
    assert served == ["/large", "done"]


def test_a_client_that_reads_slowly_is_not(connect: Connect) -> None:
    sock = connect()
    sock.sendall(GET.replace(b" / ", b" /large ") + b"\r\n")
    size, end = 0, time.monotonic() + 1.5
    while part := sock.recv(1 << 20):
        size += len(part)
        if time.monotonic() < end:
            time.sleep(0.02)
    assert size > 64_000_000


def test_broken_http_is_answered_by_400(connect: Connect) -> None:
    sock = connect()
    sock.sendall(b"\x16\x03\x01 what?\r\n\r\n")
    assert rest(sock).startswith(b"HTTP/1.1 400 Bad Request")
