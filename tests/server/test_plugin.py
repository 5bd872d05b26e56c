"""Our routes and middleware on vLLM's own application, built by vLLM from flags; only the engine is missing."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

from attention_plugins.decode.registry import selectors
from kvcache.registry import policies
from server.plugin import LongreachPlugin, create_plugin
from server.scope import current_scope
from tests.server.asgi import USAGE
from tests.server.vllm_app import DESK, DESKS, ENGINE, application

Client = Callable[..., TestClient]


async def echo(request: Request) -> Any:
    """Stands for a handler of vLLM's: what it was sent, with usage."""
    body, scope = await request.json(), current_scope.get()
    assert scope is not None
    scope.tell("kv_cache", USAGE)
    content = {"body": body, "words": scope.words.get("kv_cache"), "usage": {"prompt_tokens": 7}}
    if not body.get("stream"):
        return content

    async def events() -> Any:
        yield "data: {}\n\n"
        yield 'data: {"usage":{}}\n\ndata: [DONE]\n\n'

    return StreamingResponse(events(), media_type="text/event-stream")


async def stamp(request: Request, call_next: Any) -> Any:
    """A user's own middleware, for `--middleware`."""
    response = await call_next(request)
    response.headers["x-stamp"] = "seen"
    return response


@pytest.fixture
def client(parse: Callable[..., Namespace], monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """vLLM's application for these flags, with `/v1/echo` added."""
    open_clients: list[TestClient] = []

    def build(*argv: str) -> TestClient:
        app = application(parse("m", *argv), monkeypatch)
        app.add_api_route("/v1/echo", echo, methods=["POST"])
        open_clients.append(TestClient(app))
        return open_clients[-1]

    yield build
    for each in open_clients:
        each.close()


def error_of(response: Any) -> Any:
    return response.json()["error"]


def test_vllm_finds_the_plug_in() -> None:
    assert isinstance(create_plugin(), EndpointPlugin)
    assert isinstance(create_plugin(), LongreachPlugin)


def test_policies_are_shown(client: Client) -> None:
    content = client().get("/v1/kv/policies").json()
    assert content == DESK.describe()
    assert [policy["name"] for policy in content["data"]] == ["none", *policies()]


def test_selectors_are_shown(client: Client) -> None:
    content = client().get("/v1/decode/selectors").json()
    assert content == DESKS.selectors.describe()
    assert [selector["name"] for selector in content["data"]] == ["dense", *selectors()]


def test_models_are_shown_with_the_servers_policy_and_selector(client: Client) -> None:
    content = client().get("/v1/models").json()
    selector = DESKS.selectors.default
    assert [(model["id"], model["kv_cache"], model["decode_attention"]) for model in content["data"]] == [
        ("tiny", DESK.default, selector), ("lora", DESK.default, selector)
    ]  # fmt: skip
    assert content["data"][0]["max_model_len"] == 512


def test_there_is_one_route_for_models(client: Client) -> None:
    """vLLM puts a plug-in's route in the place of its own."""
    app = client().app
    assert isinstance(app, FastAPI)
    names = [route.endpoint.__module__ for route in app.routes if getattr(route, "path", "") == "/v1/models"]  # type: ignore[attr-defined]
    assert names == ["server.plugin"]


def test_requests_pass_the_middleware(client: Client) -> None:
    response = client().post("/v1/echo", json={"prompt": "hi", "kv_cache": {"policy": "streamingllm"}})
    assert response.json() == {
        "body": {"prompt": "hi"},
        "words": {"policy": "streamingllm", "budget": 1024, "sinks": 4, "suffix": 0, "interval": 0},
        "usage": {"prompt_tokens": 7, "kv_cache": USAGE},
    }
    assert int(response.headers["content-length"]) == len(response.content)
    events = client().post("/v1/echo", json={"stream": True}).text
    assert events.startswith("data: {}\n\n") and events.endswith("data: [DONE]\n\n") and '"kv_cache":' in events


def test_readiness_turns_red_when_the_server_drains_or_its_engine_is_dead(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = client("--api-key", "secret")  # kubelets have none

    def ready() -> tuple[int, Any]:
        response = app.get("/ready")
        return response.status_code, response.json()

    assert ready() == (200, {"status": "ready", "requests_under_way": 0})
    monkeypatch.setattr(ENGINE, "errored", True)
    assert ready() == (503, {"status": "engine dead", "requests_under_way": 0})
    monkeypatch.setattr(ENGINE, "errored", False)
    monkeypatch.setattr(ENGINE.door, "closed", True)
    assert ready() == (503, {"status": "draining", "requests_under_way": 0})
    response = app.post("/v1/completions", json={"prompt": "x"}, headers={"authorization": "Bearer secret"})
    assert (response.status_code, error_of(response)["type"]) == (503, "ServiceUnavailableError")


def test_vllms_routes_pass_it_too(client: Client) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/invocations"):
        response = client().post(path, json={"kv_cache": {"policy": "nonsense"}})
        assert (response.status_code, error_of(response)["param"]) == (400, "kv_cache.policy"), path
        response = client().post(path, json={"decode_attention": {"selector": "nonsense"}})
        assert (response.status_code, error_of(response)["param"]) == (400, "decode_attention.selector"), path


def test_broken_json_is_refused_in_openais_shape(client: Client) -> None:
    response = client().post(
        "/v1/completions", content=b'{"kv_cache": \xff', headers={"content-type": "application/json"}
    )
    assert (response.status_code, error_of(response)["message"]) == (400, "The body isn't UTF-8: byte 13 (0xff).")


def test_the_api_key_comes_first(client: Client) -> None:
    with_key = client("--api-key", "secret")
    wrong = {"kv_cache": {"policy": "nonsense"}}
    assert with_key.post("/v1/echo", json=wrong).status_code == 401
    assert with_key.get("/v1/kv/policies").status_code == 401
    headers = {"authorization": "Bearer secret"}
    assert with_key.post("/v1/echo", json=wrong, headers=headers).status_code == 400
    assert with_key.get("/v1/kv/policies", headers=headers).status_code == 200


def test_refusals_carry_cors_headers(client: Client) -> None:
    page = "http://page.example"
    response = client("--allowed-origins", f'["{page}"]').post(
        "/v1/echo", json={"kv_cache": 5}, headers={"origin": page}
    )
    assert (response.status_code, response.headers["access-control-allow-origin"]) == (400, page)


def test_users_middleware_is_outside_of_ours(client: Client) -> None:
    stamped = client("--middleware", f"{__name__}.stamp")
    assert stamped.post("/v1/echo", json={"kv_cache": 5}).headers["x-stamp"] == "seen"
    response = stamped.post("/v1/echo", json={"kv_cache": {"policy": "none"}})
    assert (response.headers["x-stamp"], response.json()["usage"]["kv_cache"]) == ("seen", USAGE)


def test_behind_a_proxy_with_a_path(client: Client) -> None:
    proxied = client("--root-path", "/llm", "--api-key", "secret")
    headers = {"authorization": "Bearer secret"}
    for path in ("/v1/kv/policies", "/llm/v1/kv/policies"):
        assert proxied.get(path).status_code == 401
        assert proxied.get(path, headers=headers).json() == DESK.describe()
    response = proxied.post("/llm/v1/echo", json={"kv_cache": {"policy": "none"}}, headers=headers)
    assert response.json()["words"] == {"policy": "none"}


def test_docs_show_our_route_unless_switched_off(client: Client) -> None:
    assert "/v1/kv/policies" in client().get("/openapi.json").json()["paths"]
    without = client("--disable-fastapi-docs")
    assert without.get("/openapi.json").status_code == 404
    assert without.get("/v1/kv/policies").status_code == 200
