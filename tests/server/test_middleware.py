"""The request side of the middleware: what handlers get to see, and what is refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

from server.bodies import BodyMiddleware
from server.middleware import FieldsMiddleware
from server.policies import PolicyDesk
from server.scope import current_scope
from tests.server.asgi import (
    LIMITS,
    USAGE,
    Handler,
    answer,
    body_messages,
    desks,
    exchange,
    http_scope,
    post,
    sent_body,
)

POLICY = {"policy": "streamingllm", "budget": 512}
WORDS = {"policy": "streamingllm", "budget": 512, "sinks": 4, "suffix": 0, "interval": 0}


def length_seen(handler: Handler) -> int:
    return int(dict(handler.scope["headers"])[b"content-length"])


def test_the_field_is_taken_out_checked_and_handed_to_the_engine() -> None:
    handler = Handler()
    post(handler, {"prompt": "hi", "kv_cache": POLICY, "n": 2})
    assert json.loads(handler.body) == {"prompt": "hi", "n": 2}
    assert handler.words == WORDS
    assert length_seen(handler) == len(handler.body)


def test_null_means_the_servers_default() -> None:
    handler = Handler()
    post(handler, {"prompt": "hi", "kv_cache": None})
    assert (json.loads(handler.body), handler.words) == ({"prompt": "hi"}, None)


@pytest.mark.parametrize(
    "body",
    [
        b'{ "prompt":"hi",\n "n" : 1e0 }',
        b'{"messages": [{"role": "user", "content": "set \\"kv_cache\\" to none"}]}',
        b'{"tools": [{"kv_cache": {"policy": "nonsense"}}], "x": {"kv_cache": 1}}',
        b'{"prompt": "kv_cache"}',
        b'["kv_cache"]',
        b'"kv_cache"',
        b"",
    ],
    ids=["plain", "in-text", "nested", "in-prompt", "list", "string", "empty"],
)
def test_other_bodies_pass_byte_by_byte(body: bytes) -> None:
    handler = Handler()
    post(handler, body)
    assert handler.body == body
    assert handler.words is None
    assert length_seen(handler) == len(body)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("kvcache", "kv_cache"), ("kv-cache", "kv_cache"), ("KV_Cache", "kv_cache"), ("kv_cahe", "kv_cache"),
     ("decodeAttention", "decode_attention"), ("prefil_attention", "prefill_attention")],
)  # fmt: skip
def test_misspelt_fields_are_refused(name: str, meant: str) -> None:
    """vLLM would answer without a policy."""
    handler = Handler()
    sent = post(handler, {"prompt": "x", name: POLICY})
    assert sent[0]["status"] == 400 and handler.seen == []
    error = json.loads(sent_body(sent))["error"]
    assert error["param"] == name and f"did you mean {meant}?" in error["message"]


def test_vllms_own_fields_are_not_taken_for_misspelt_ones() -> None:
    """Of all that OpenAI's and vLLM's requests have."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    for kind in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):
        desks().refuse_misspelt(dict.fromkeys(kind.model_fields))


def test_text_survives_the_rewriting() -> None:
    text = "naïve 東京 🎉 \\ud83d \u2028 \x00"
    handler = Handler()
    post(handler, b'{"kv_cache": {"policy": "none"}, "pair": "\\ud83d\\ude00", "big": 123456789012345678901, "text": '
         + json.dumps(text, ensure_ascii=False).encode() + b"}")  # fmt: skip
    assert json.loads(handler.body) == {"pair": "😀", "big": 123456789012345678901, "text": text}


def test_a_body_in_several_messages_without_length() -> None:
    body = json.dumps({"prompt": "東京", "kv_cache": POLICY}, ensure_ascii=False).encode()
    for cut in range(1, len(body)):
        handler = Handler()
        exchange(handler, http_scope(transfer_encoding="chunked"), body_messages(body[:cut], b"", body[cut:]))
        assert json.loads(handler.body) == {"prompt": "東京"}
        assert handler.words == WORDS
        assert b"content-length" not in dict(handler.scope["headers"])


def test_a_body_of_many_megabytes() -> None:
    text = "x" * 20_000_000
    handler = Handler()
    post(handler, {"prompt": text, "kv_cache": POLICY})
    assert json.loads(handler.body) == {"prompt": text}


def test_a_client_that_leaves_while_sending_is_not_taken_for_done() -> None:
    """`{"prompt": "hi"}` is complete JSON, but its sender meant to go on."""
    messages = [*body_messages(b'{"prompt": "hi"}', b""), {"type": "http.disconnect"}]
    messages[1]["more_body"] = True
    errors = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await Request(scope, receive).body()
        except ClientDisconnect as error:
            errors.append(error)

    exchange(app, http_scope(), messages)
    assert len(errors) == 1


def test_a_disconnect_after_the_body_reaches_the_handler() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([await receive(), await receive()])

    _, left = exchange(app, http_scope(), [*body_messages(b"{}"), {"type": "http.disconnect"}])
    assert [message["type"] for message in seen] == ["http.request", "http.disconnect"]
    assert left == []


@pytest.mark.parametrize("kind", ["Application/JSON", "application/json; charset=utf-8", "application/vnd.api+json"])
def test_content_types_of_json(kind: str) -> None:
    handler = Handler()
    exchange(handler, http_scope(content_type=kind), body_messages(json.dumps({"kv_cache": POLICY}).encode()))
    assert handler.words == WORDS


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "text/plain", None])
def test_other_content_types_are_not_read(kind: str | None) -> None:
    handler = Handler()
    exchange(handler, http_scope(content_type=kind), body_messages(b'{"kv_cache":', b"1}"))
    assert handler.body == b'{"kv_cache":1}'
    assert handler.words is None


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE"])
def test_other_methods_are_left_alone(method: str) -> None:
    handler = Handler(answer(b'{"usage":{}}'))
    scope = http_scope(method)
    messages = body_messages(b'{"kv_cache": 1}')
    assert exchange(handler, scope, messages) == (handler.answer, [])
    assert (handler.seen, handler.words) == (messages, "no scope")


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
def test_other_protocols_are_left_alone(kind: str) -> None:
    handler = Handler()
    exchange(handler, {"type": kind}, [])
    assert handler.words == "no scope"


@pytest.mark.parametrize(
    ("content", "field", "words"),
    [
        ({"kv_cache": {"policy": "snap"}}, "kv_cache.policy", ("snap", "none, streamingllm")),
        ({"kv_cache": {}}, "kv_cache.policy", ("missing",)),
        ({"kv_cache": "snapkv"}, "kv_cache", ("object",)),
        ({"kv_cache": {"policy": "snapkv", "windw": 3}}, "kv_cache.windw", ("no such argument", "window")),
        ({"kv_cache": {"policy": "snapkv", "budget": "140%"}}, "kv_cache.budget", ("140%",)),
        ({"kv_cache": {"policy": "streamingllm", "budget": 51}}, "kv_cache.budget", ("51", ">= 52")),
        ({"kv_cache": {"policy": "none", "budget": 5}}, "kv_cache.budget", ("takes no arguments",)),
        ({"vllm_xargs": {"kv_cache": "x"}}, "vllm_xargs.kv_cache", ("not read",)),
        ({"kv_cache": POLICY, "use_beam_search": True}, "kv_cache", ("beam search",)),
    ],
)
def test_refusals_are_openai_errors(content: dict[str, Any], field: str, words: tuple[str, ...]) -> None:
    handler = Handler()
    sent = post(handler, {"prompt": "hi", **content})
    assert handler.words == "not called"
    assert sent[0]["status"] == 400
    error = json.loads(sent_body(sent))["error"]
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", field, 400)
    assert all(word in error["message"] for word in words), error["message"]


def test_where_policies_cannot_run_only_none_is_taken() -> None:
    desk = PolicyDesk({"policy": "none"}, 16, unavailable="no adapter for this chip")
    handler = Handler()
    sent = post(handler, {"kv_cache": POLICY}, desk)
    assert sent[0]["status"] == 400 and b"no adapter for this chip" in sent_body(sent)
    post(handler, {"kv_cache": {"policy": "none"}}, desk)
    assert handler.words == {"policy": "none"}


def test_beam_search_runs_without_compression_and_tells_no_usage() -> None:
    """Whatever the server's default: each step is a new prompt, and their sums mean nothing."""
    for field in ({}, {"kv_cache": {"policy": "none"}}):
        handler = Handler(answer(b'{"usage":{}}'), finished=(USAGE, USAGE))
        assert post(handler, {"use_beam_search": True, **field}) == handler.answer
        assert handler.words == {"policy": "none"}
        assert json.loads(handler.body) == {"use_beam_search": True}
    handler = Handler()
    post(handler, {"use_beam_search": False})
    assert handler.words is None


def test_requests_at_the_same_time_have_scopes_of_their_own() -> None:
    """Also in tasks that a handler starts, as vLLM's do."""
    seen: dict[str, Any] = {}

    class State:
        state = type("S", (), {"longreach_desks": desks(), "longreach_limits": LIMITS})

    async def engine(name: str) -> None:
        scope = current_scope.get()
        assert scope is not None
        await asyncio.sleep(0.01)
        assert current_scope.get() is scope
        seen[name] = scope.words["kv_cache"]
        scope.tell("kv_cache", {**USAGE, "prompt_tokens": len(name)})

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.create_task(engine(json.loads((await receive())["body"])["prompt"]))
        for message in answer(b'{"usage":{}}'):
            await send(message)

    async def one(name: str, policy: str) -> bytes:
        sent: list[dict[str, Any]] = []
        queue = body_messages(json.dumps({"prompt": name, "kv_cache": {"policy": policy}}).encode())

        async def receive() -> Any:
            return queue.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        await BodyMiddleware(FieldsMiddleware(app))({**http_scope(), "app": State}, receive, send)
        return sent_body(sent)

    async def both() -> list[bytes]:
        return list(await asyncio.gather(one("a", "none"), one("bb", "random")))

    bodies = asyncio.run(both())
    assert [json.loads(body)["usage"]["kv_cache"]["prompt_tokens"] for body in bodies] == [1, 2]
    assert (seen["a"]["policy"], seen["bb"]["policy"]) == ("none", "random")


TIDAL = {
    "selector": "tidal",
    "tokens": 512,
    "min_context": 8192,
    "kernel": 1,
    "window": 32,
    "pinned": 0.5,
    "heads": "shared",
}
ONE_STEP = {**TIDAL, "steps": {"select": 1}}


def test_both_fields_are_taken_out() -> None:
    handler = Handler()
    post(handler, {"prompt": "hi", "kv_cache": POLICY, "decode_attention": {"selector": "quest", "tokens": 64}})
    assert json.loads(handler.body) == {"prompt": "hi"}
    assert length_seen(handler) == len(handler.body)
    assert handler.words == WORDS
    quest = {"selector": "quest", "tokens": 64, "min_context": 12288, "window": 32, "pinned": 0.75, "spread": 0.5}
    assert handler.decode == quest
    post(handler, {"prompt": "hi", "decode_attention": {"selector": "tidal", "tokens": 512}})
    assert (handler.words, handler.decode) == (None, TIDAL)
    post(handler, {"prompt": "hi", "decode_attention": None})
    assert (handler.words, handler.decode) == (None, None)


@pytest.mark.parametrize(
    ("content", "field", "words"),
    [
        ({"decode_attention": "tidal"}, "decode_attention", ("object",)),
        ({"decode_attention": {"selector": "tide"}}, "decode_attention.selector", ("tide", "dense, recycled")),
        ({"decode_attention": {"selector": "tidal", "token": 64}}, "decode_attention.token", ("no such argument",)),
        ({"decode_attention": {"selector": "local"}}, "decode_attention.selector", ("--decode-selectors local",)),
        ({"decode_attention": {"selector": "tidal"}, "kv_cache": POLICY}, "decode_attention.selector",
         ("tidal needs a whole cache", "kv_cache.policy streamingllm", "dense, recycled", "kv_cache.policy none")),
        ({"vllm_xargs": {"decode_attention": "x"}}, "vllm_xargs.decode_attention", ("not read",)),
        ({"decode_attention": {"selector": "quest"}, "use_beam_search": True}, "decode_attention", ("beam search",)),
    ],
)  # fmt: skip
def test_refused_selectors_are_openai_errors(content: dict[str, Any], field: str, words: tuple[str, ...]) -> None:
    handler = Handler()
    sent = post(handler, {"prompt": "hi", **content})
    assert handler.words == "not called"
    assert sent[0]["status"] == 400
    error = json.loads(sent_body(sent))["error"]
    assert (error["type"], error["param"], error["code"]) == ("BadRequestError", field, 400)
    assert all(word in error["message"] for word in words), error["message"]


def test_the_servers_own_policy_and_selector_count_for_what_goes_together() -> None:
    compressing = desks(PolicyDesk(POLICY, 16))
    handler = Handler()
    assert post(handler, {"decode_attention": {"selector": "tidal"}}, compressing)[0]["status"] == 400
    post(handler, {"decode_attention": {"selector": "tidal"}, "kv_cache": {"policy": "none"}}, compressing)
    assert (handler.words, handler.decode) == ({"policy": "none"}, TIDAL | {"tokens": 2048})
    told = json.loads(sent_body(post(handler, {"decode_attention": {"selector": "tidal"}}, compressing)))["error"]
    assert "Allowed: dense, recycled, quest; or any" in told["message"]  # loki isn't enabled
    selecting = desks(default={"selector": "tidal"})
    sent = post(handler, {"kv_cache": POLICY}, selecting)
    assert sent[0]["status"] == 400 and b"tidal needs a whole cache" in sent_body(sent)
    post(handler, {"kv_cache": POLICY, "decode_attention": {"selector": "dense"}}, selecting)
    assert (handler.words, handler.decode) == (WORDS, {"selector": "dense"})
    post(handler, {"kv_cache": {"policy": "none"}}, selecting)
    assert handler.decode is None


def test_beam_search_reads_everything_whatever_the_servers_selector() -> None:
    handler = Handler(answer(b'{"usage":{}}'), finished=(ONE_STEP,))
    sent = post(handler, {"use_beam_search": True}, desks(default={"selector": "tidal"}))
    assert (handler.decode, sent) == ({"selector": "dense"}, handler.answer)


def test_answers_tell_both_fields_and_add_up_steps() -> None:
    sent = post(Handler(answer(b'{"usage":{"prompt_tokens":7}}'), finished=(USAGE, ONE_STEP, ONE_STEP)), {})
    usage = json.loads(sent_body(sent))["usage"]
    assert {**usage.pop("kv_cache"), "prompt_tokens": 7} == USAGE
    assert usage == {"prompt_tokens": 7, "decode_attention": {**TIDAL, "steps": {"select": 2}}}
