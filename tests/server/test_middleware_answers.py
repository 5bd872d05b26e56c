"""The answer side of the middleware: usage is added where there is one, and all else passes as it is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.asgi import USAGE, Handler, answer, body_messages, exchange, http_scope, post, sent_body, stream

ANSWER = b'{"id":"x","choices":[{"text":"\xe6\x9d\xb1 \\"usage\\""}],"usage":{"prompt_tokens":7},"n":null}'
DELTA = b'data: {"choices":[{"delta":{"content":"\xe6\x9d\xb1 \xf0\x9f\x8e\x89"}}]}\n\n'
LAST = b'data: {"choices":[],"usage":{"prompt_tokens":7},"t":"\xe4\xba\xac"}\n\n'
DONE = b"data: [DONE]\n\n"


def told(sent: list[dict[str, Any]]) -> Any:
    return json.loads(sent_body(sent))["usage"]["kv_cache"]


def test_a_json_answer_is_told_what_was_kept() -> None:
    sent = post(Handler(answer(ANSWER, content_length=str(len(ANSWER)), x_id="7"), (USAGE,)), {})
    content = json.loads(sent_body(sent))
    assert content["usage"] == {"prompt_tokens": 7, "kv_cache": USAGE}
    assert {**content, "usage": {"prompt_tokens": 7}} == json.loads(ANSWER)
    headers = dict(sent[0]["headers"])
    assert (headers[b"content-length"], headers[b"x-id"]) == (str(len(sent_body(sent))).encode(), b"7")


def test_a_json_answer_in_several_messages_without_length() -> None:
    start, body = answer(ANSWER)
    whole = sent_body(post(Handler([start, body], (USAGE,)), {}))
    for cut in range(len(ANSWER) + 1):
        parts = [{**body, "body": ANSWER[:cut], "more_body": True}, {**body, "body": ANSWER[cut:]}]
        sent = post(Handler([start, *parts], (USAGE,)), {})
        assert sent_body(sent) == whole
        assert int(dict(sent[0]["headers"])[b"content-length"]) == len(whole)


def test_several_prompts_add_up() -> None:
    other = {**USAGE, "prompt_tokens": 3, "kept_tokens": {"mean": 1.0, "min": 0.5, "max": 2.0}}
    assert told(post(Handler(answer(ANSWER), (USAGE, other)), {})) == {
        "policy": "none", "prompt_tokens": 10, "kept_tokens": {"mean": 4.0, "min": 0.5, "max": 7.0}, "bytes_held": 4,
        "bytes_freed": 2,
    }  # fmt: skip


def test_requests_that_are_not_json_are_told_too() -> None:
    """Transcriptions come as forms."""
    sent, _ = exchange(Handler(answer(ANSWER), (USAGE,)), http_scope(content_type="multipart/form-data"),
                       body_messages(b"--x"))  # fmt: skip
    assert told(sent) == USAGE


@pytest.mark.parametrize(
    "messages",
    [
        answer(b'{"error":{"message":"no \\"usage\\"","code":400}}', status=400),
        answer(b'{"object":"list","data":[]}'),
        answer(b'{"usage":null}'),
        answer(b'{"usage":5}'),
        answer(b'{"response":"usage"}'),
        answer(b'[{"usage":{}}]'),
        answer(b'"usage"'),
        answer(b'{"usage":{}'),
        answer(b'{"usage":{}}', "text/plain"),
        answer(b'{"usage":\xff{}}', "application/octet-stream"),
    ],
)
def test_answers_without_usage_keep_every_byte(messages: list[dict[str, Any]]) -> None:
    sent = post(Handler(messages, (USAGE,)), {})
    assert sent_body(sent) == sent_body(messages)
    assert sent[0]["status"] == messages[0]["status"]


def test_an_error_with_usage_keeps_its_status() -> None:
    sent = post(Handler(answer(ANSWER, status=503), (USAGE,)), {})
    assert (sent[0]["status"], told(sent)) == (503, USAGE)


def test_nothing_is_held_back_when_no_engine_request_has_finished() -> None:
    for messages in (answer(ANSWER), stream(LAST[:9], LAST[9:])):
        assert post(Handler(messages), {}) == messages


def test_an_answer_without_headers() -> None:
    messages: list[dict[str, Any]] = [{"type": "http.response.start", "status": 204}, {"type": "http.response.body"}]
    assert post(Handler(messages, (USAGE,)), {}) == messages


def test_a_start_without_a_body_sends_nothing_more() -> None:
    """The server outside then sees that the app didn't answer, and says so."""
    assert post(Handler(answer(ANSWER)[:1], (USAGE,)), {}) == []


class Failing(Handler):
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await super().__call__(scope, receive, send)
        raise RuntimeError("engine died")


def test_an_app_that_fails_before_its_body_leaves_room_for_an_error() -> None:
    handler = Failing(answer(ANSWER)[:1], (USAGE,))
    with pytest.raises(RuntimeError, match="engine died"):
        post(handler, {})


def test_only_the_event_with_usage_is_rewritten() -> None:
    sent = post(Handler(stream(DELTA, DELTA, LAST, DONE), (USAGE,)), {})
    parts = [message["body"] for message in sent[1:]]
    assert [parts[0], parts[1], parts[3]] == [DELTA, DELTA, DONE]
    assert json.loads(parts[2].removeprefix(b"data: "))["usage"]["kv_cache"] == USAGE
    assert parts[2].endswith(b"}\n\n") and "京".encode() in parts[2]


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_events_cut_anywhere(end: bytes) -> None:
    """Between and within events, lines, line ends and characters of several bytes."""
    data = (b": keep-alive\n\nevent: message\nid: 1\n" + DELTA + LAST + DONE).replace(b"\n\n", end)
    whole = sent_body(post(Handler(stream(data), (USAGE,)), {}))
    assert whole == data.replace(b'{"prompt_tokens":7}', b'{"prompt_tokens":7,"kv_cache":%s}' % compact(USAGE))
    for cut in range(1, len(data)):
        assert sent_body(post(Handler(stream(data[:cut], data[cut:]), (USAGE,)), {})) == whole
    assert sent_body(post(Handler(stream(*(bytes([byte]) for byte in data)), (USAGE,)), {})) == whole


def compact(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def test_a_stream_that_ends_without_a_line_end() -> None:
    sent = sent_body(post(Handler(stream(DELTA, LAST.strip()), (USAGE,)), {}))
    assert sent.startswith(DELTA) and sent.endswith(b'"t":"\xe4\xba\xac"}')
    assert json.loads(sent[len(DELTA) + 6 :])["usage"]["kv_cache"] == USAGE
    messages = stream(LAST)[:2]
    messages[1]["more_body"] = False
    assert b'"kv_cache"' in sent_body(post(Handler(messages, (USAGE,)), {}))


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"error":{"message":"no usage","code":500}}\n\n',
        b'data: {"usage":null}\n\n',
        b'data: {"tool":{"name":"usage"}}\n\n',
        b'data: "usage"\n\n',
        b'data: {"usage":{\n\n',
        b'event: "usage"\ndata:\n\n',
        b'retry: {"usage":{}}\n\n',
    ],
)
def test_events_without_usage_keep_every_byte(event: bytes) -> None:
    for messages in (stream(event, DONE), stream(event[:11], event[11:], DONE)):
        assert sent_body(post(Handler(messages, (USAGE,)), {})) == event + DONE


def test_a_stream_that_breaks_off_sent_what_was_whole() -> None:
    sent: list[dict[str, Any]] = []
    with pytest.raises(RuntimeError, match="engine died"):
        exchange(Failing(stream(DELTA, LAST + b'data: {"cho')[:-1], (USAGE,)), http_scope(), body_messages(b"{}"),
                 sent=sent)  # fmt: skip
    assert sent_body(sent).startswith(DELTA)
    assert sent_body(sent).endswith(b'"t":"\xe4\xba\xac"}\n\n')
    assert sent[-1]["more_body"]


@pytest.mark.parametrize(
    ("event", "path"),
    [
        (b'{"type":"response.completed","response":{"id":"r","usage":{"input_tokens":7}}}', ("response", "usage")),
        (b'{"type":"message_delta","delta":{"stop_reason":"x"},"usage":{"output_tokens":7}}', ("usage",)),
        (b'{"type":"message-end","delta":{"usage":{"tokens":{}}}}', ("delta", "usage")),
    ],
    ids=["responses", "anthropic", "cohere"],
)
def test_events_of_other_protocols(event: bytes, path: tuple[str, ...]) -> None:
    content = json.loads(sent_body(post(Handler(stream(b"event: x\ndata: " + event + b"\n\n"), (USAGE,)), {}))[15:])
    for name in path:
        content = content[name]
    assert content["kv_cache"] == USAGE
