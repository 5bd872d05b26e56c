"""Limits of a request's body: its size and its time, told before a handler is called."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from server.bodies import CONTENT, BodyMiddleware
from server.errors import StartError
from server.limits import Limits, make_limits
from tests.server.asgi import Handler, Message, answer, body_messages, http_scope, sent_body

SMALL = Limits(body_bytes=100, client_seconds=0.05)


def exchange(
    messages: list[Message], limits: Limits = SMALL, waits: float = 0, **headers: str
) -> tuple[Handler, list[Message], int]:
    """The handler, what the client was sent, and how many messages nobody asked for."""
    handler, sent, left = Handler(answer(b"{}")), [], list(messages)

    async def receive() -> Message:
        await asyncio.sleep(waits)
        return left.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    app = SimpleNamespace(state=SimpleNamespace(longreach_limits=limits))
    asyncio.run(BodyMiddleware(handler)({**http_scope(**headers), "app": app}, receive, send))
    return handler, sent, len(left)


def error(sent: list[Message]) -> tuple[int, dict[str, Any]]:
    return sent[0]["status"], json.loads(sent_body(sent))["error"]


def test_a_body_within_the_limit_comes_in_one_piece() -> None:
    handler, sent, _ = exchange(body_messages(b'{"a":', b"[1", b"]}"))
    assert (handler.seen, handler.scope[CONTENT]) == (body_messages(b'{"a":[1]}'), {"a": [1]})
    assert sent == answer(b"{}")


def test_the_limit_is_exact() -> None:
    assert exchange(body_messages(b"1" * 60, b"2" * 40))[1] == answer(b"{}")
    status, told = error(exchange(body_messages(b"1" * 60, b"2" * 41))[1])
    assert (status, told["code"], told["type"], told["param"]) == (413, 413, "RequestTooLargeError", None)
    assert "larger than 100 bytes" in told["message"] and "--max-body-bytes" in told["message"]


def test_a_length_that_is_too_large_is_answered_before_the_body() -> None:
    handler, sent, unread = exchange(body_messages(b"1" * 101), content_length="101")
    assert (error(sent)[0], unread, handler.scope) == (413, 1, None)


def test_without_a_length_it_is_answered_as_soon_as_it_is_too_much() -> None:
    parts = [b"1" * 30] * 3 + [b"1" * 31]  # the fourth is too much
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in [*parts, *parts]]
    handler, sent, unread = exchange(messages, transfer_encoding="chunked")
    assert (error(sent)[0], unread, handler.scope) == (413, 4, None)


def test_a_body_that_comes_too_slowly_is_answered_by_408() -> None:
    messages = [{"type": "http.request", "body": b"1", "more_body": True}] * 50
    handler, sent, unread = exchange(messages, waits=0.02)
    assert (error(sent)[0], handler.scope) == (408, None)
    assert unread >= 40 and (b"connection", b"close") in sent[0]["headers"]


def test_a_large_body_may_take_longer() -> None:
    """As long as it comes fast: 0.05 s, and one for each 16 KiB."""
    limits = Limits(body_bytes=1 << 20, client_seconds=0.05)
    messages = body_messages(*[b"%d" % place * 4096 for place in range(8)])
    assert exchange(messages, limits, waits=0.02, content_type="text/plain")[1] == answer(b"{}")


def test_a_client_that_leaves_is_the_handlers_business() -> None:
    messages: list[Message] = [{"type": "http.request", "body": b'{"a', "more_body": True}, {"type": "http.disconnect"}]
    handler, _, _ = exchange(messages)
    assert handler.seen == messages


def test_bad_json_names_its_place() -> None:
    handler, sent, _ = exchange(body_messages(b'{"temperature": 1e999}'))
    assert (error(sent)[0], error(sent)[1]["param"], handler.scope) == (400, "temperature", None)


def test_limits_come_from_flags_and_the_models_context(parse: Callable[..., Namespace]) -> None:
    assert make_limits(parse("m"), 8192) == Limits((4 << 20) + 64 * 8192, 64 << 10, 256, 60)
    flags = ("--max-body-bytes", "5000", "--max-header-bytes", "2000", "--h11-max-header-count", "20",
             "--client-timeout", "2.5")  # fmt: skip
    assert make_limits(parse("m", *flags), 8192) == Limits(5000, 2000, 20, 2.5)


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--max-body-bytes", "0"),
        ("--max-header-bytes", "-1"),
        ("--client-timeout", "nan"),
        ("--client-timeout", "inf"),
        ("--h11-max-header-count", "1"),
    ],
)
def test_limits_that_leave_no_room_are_refused(flag: str, value: str, parse: Callable[..., Namespace]) -> None:
    with pytest.raises(StartError, match=f"{flag}: .* allowed are"):
        make_limits(parse("m", flag, value))
