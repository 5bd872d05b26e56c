"""What keys open, on vLLM's own application; only the engine is missing."""

from __future__ import annotations

import asyncio
import base64
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList
from vllm.plugins.endpoint_plugins.interface import init_endpoint_plugins_state

from server.access import settings
from server.access.keys import AREAS, new_key
from server.access.metrics import KeyMetrics
from server.access.middleware import area_of, current_visitor
from server.access.settings import make_access
from server.app import allow_plugin
from server.draining import Door
from server.errors import StartError
from tests.server.asgi import desks

Parse = Callable[..., Namespace]
ENGINE = SimpleNamespace(desks=desks(), door=Door(), errored=False, model_config=SimpleNamespace(max_model_len=512))
SECRETS: dict[str, str] = {}


class Models:
    async def show_available_models(self) -> ModelList:
        return ModelList(data=[ModelCard(id="tiny", max_model_len=512)])


async def use(request: Request) -> Any:
    """Stands for a handler of vLLM's: uses as many tokens as it is told."""
    visitor, tokens = current_visitor.get(), (await request.json())["tokens"]
    if visitor:
        visitor.charge("prompt", tokens)
    return {"visitor": visitor and visitor.key.name}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("access") / "keys.txt"
    limits: dict[str, dict[str, Any]] = {
        "alice": {},
        "slow": {"requests": 2},
        "small": {"tokens": 100},
        "prometheus": {"areas": ("metrics",)},
        "operator": {"areas": tuple(AREAS)},
    }
    lines = []
    for name, limit in limits.items():
        SECRETS[name], key = new_key(name, **limit)
        lines.append(key.line())
    file.write_text("\n".join(lines))
    return file


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    registry = CollectorRegistry()
    metrics = KeyMetrics(registry)
    monkeypatch.setattr(settings, "key_metrics", lambda: metrics)
    return registry


@pytest.fixture
def client(
    parse: Parse, monkeypatch: pytest.MonkeyPatch, registry: CollectorRegistry
) -> Iterator[Callable[..., TestClient]]:
    monkeypatch.setenv("VLLM_PLUGINS", "")
    allow_plugin()
    clients: list[TestClient] = []

    def build(*argv: str) -> TestClient:
        args = parse("m", *argv)
        app: FastAPI = build_app(args, ("generate",))
        app.add_api_route("/v1/use", use, methods=["POST"])
        app.add_api_route("/console", lambda: "page", methods=["GET"])
        app.state.openai_serving_models, app.state.log_stats, app.state.engine_client = Models(), False, ENGINE
        asyncio.run(init_endpoint_plugins_state(ENGINE, app.state, args))
        clients.append(TestClient(app, raise_server_exceptions=False))
        return clients[-1]

    yield build
    for each in clients:
        each.close()


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {SECRETS[name]}"}


def test_without_a_file_everything_is_open(client: Callable[..., TestClient]) -> None:
    open_to_all = client()
    assert open_to_all.get("/v1/models").status_code == 200
    assert open_to_all.post("/v1/use", json={"tokens": 1}).json() == {"visitor": None}


def test_a_key_is_needed_everywhere_but_where_probes_ask(client: Callable[..., TestClient], file: Path) -> None:
    """Also where vLLM's own key isn't: every route that there is, and those that aren't."""
    closed = client("--api-key-file", str(file))
    app: Any = closed.app
    found = {(route.path, method) for route in app.routes for method in getattr(route, "methods", None) or ["GET"]}
    paths = {path for path, _ in found}
    assert {"/v1/completions", "/invocations", "/tokenize", "/metrics", "/console", "/scale_elastic_ep"} <= paths
    opened = {path for path, method in found
              if closed.request(method, path, content=b"{").status_code not in (401, 405)}  # fmt: skip
    assert opened <= {"/health", "/ready", "/ping"}, opened
    for path in ("/nowhere", "//metrics", "/v1//models", "/healthy", "/V1/models", "/health/../v1/models"):
        assert closed.get(path).status_code == 401, path


def test_the_refusal_has_openais_shape(client: Callable[..., TestClient], file: Path) -> None:
    closed = client("--api-key-file", str(file))
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic ?"}, {"x-api-key": "ü"},
                    {"authorization": f"Bearer {file.read_text().split()[1]}"}):  # fmt: skip
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        refused = closed.get("/v1/models", headers=encoded)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.json()["error"]["type"] == "AuthenticationError"
    assert closed.get("/console").headers["www-authenticate"].startswith("Basic ")  # so that a browser asks for it


def test_three_ways_to_bring_a_key(client: Callable[..., TestClient], file: Path) -> None:
    closed = client("--api-key-file", str(file))
    basic = base64.b64encode(f"anyone:{SECRETS['alice']}".encode()).decode()
    for headers in (bearer("alice"), {"authorization": f"Basic {basic}"}, {"x-api-key": SECRETS["alice"]}):
        assert closed.get("/v1/models", headers=headers).status_code == 200
        assert closed.post("/v1/use", json={"tokens": 1}, headers=headers).json() == {"visitor": "alice"}


def test_areas_are_apart(client: Callable[..., TestClient], file: Path) -> None:
    closed = client("--api-key-file", str(file))
    paths = {"api": "/v1/models", "metrics": "/metrics", "console": "/console", "admin": "/nowhere"}
    opens = {
        name: [area for area, path in paths.items() if closed.get(path, headers=bearer(name)).status_code != 403]
        for name in ("alice", "prometheus", "operator")
    }
    assert opens == {"alice": ["api"], "prometheus": ["metrics"], "operator": list(paths)}
    told = closed.get("/metrics", headers=bearer("alice")).json()["error"]
    assert (told["type"], "isn't for metrics; it has for=api" in told["message"]) == ("PermissionDeniedError", True)


@pytest.mark.parametrize(
    "path, area",
    [
        ("/v1/chat/completions", "api"),
        ("/v1/load_lora_adapter", "admin"),
        ("/metrics/", "metrics"),
        ("/metricsx", "admin"),
        ("/console/main.js", "console"),
        ("/consoles", "admin"),
        ("/v11", "admin"),
        ("/sleep", "admin"),
        ("/", "admin"),
    ],
)
def test_paths_have_an_area(path: str, area: str) -> None:
    assert area_of(path) == area


def test_paths_may_be_opened(client: Callable[..., TestClient], file: Path) -> None:
    closed = client("--api-key-file", str(file), "--open-paths", "/metrics")
    assert closed.get("/metrics").status_code == 200
    assert closed.get("/health").status_code == 401


def test_too_many_requests_are_told_when_to_try_again(
    client: Callable[..., TestClient], file: Path, registry: CollectorRegistry
) -> None:
    closed = client("--api-key-file", str(file))
    answers = [closed.post("/v1/use", json={"tokens": 1}, headers=bearer("slow")) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    told = answers[2].json()["error"]
    assert (told["type"], told["code"]) == ("RateLimitError", 429) and "2 requests a minute" in told["message"]
    assert closed.post("/v1/use", json={"tokens": 1}, headers=bearer("alice")).status_code == 200
    count = registry.get_sample_value
    assert count("longreach_key_requests_total", {"key": "slow", "answer": "let in"}) == 2
    assert count("longreach_key_requests_total", {"key": "slow", "answer": "429"}) == 1
    assert count("longreach_key_tokens_total", {"key": "slow", "kind": "prompt"}) == 2
    assert count("longreach_key_requests_running", {"key": "slow"}) == 0


def test_tokens_are_charged(client: Callable[..., TestClient], file: Path) -> None:
    closed = client("--api-key-file", str(file))
    answers = [closed.post("/v1/use", json={"tokens": 150}, headers=bearer("small")) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert int(answers[1].headers["retry-after"]) >= 30


def test_the_key_comes_before_the_body(client: Callable[..., TestClient], file: Path) -> None:
    closed = client("--api-key-file", str(file), "--max-body-bytes", "2000")
    big = b"x" * 3000
    assert closed.post("/v1/use", content=big).status_code == 401
    assert closed.post("/v1/use", content=big, headers=bearer("alice")).status_code == 413


def test_behind_a_proxy_with_a_path(client: Callable[..., TestClient], file: Path) -> None:
    closed = client("--api-key-file", str(file), "--root-path", "/llm")
    assert closed.get("/llm/v1/models").status_code == 401
    assert closed.get("/llm/v1/models", headers=bearer("alice")).status_code == 200
    assert closed.get("/llm/health").status_code != 401


def test_no_key_gets_into_metrics(client: Callable[..., TestClient], file: Path, registry: CollectorRegistry) -> None:
    from prometheus_client import generate_latest

    closed = client("--api-key-file", str(file))
    for name in SECRETS:
        closed.get("/v1/models", headers=bearer(name))
    closed.get("/v1/models", headers={"authorization": "Bearer lr-guess"})
    told = generate_latest(registry).decode()
    assert 'key="(unknown)"' in told and "lr-" not in told
    assert not any(secret in told for secret in SECRETS.values())


def test_vllms_own_key_beside_the_file_is_refused(parse: Parse, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartError, match="would need both keys"):
        make_access(parse("m", "--api-key-file", str(file), "--api-key", "secret"))
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with pytest.raises(StartError, match="would need both keys") as caught:
        make_access(parse("m", "--api-key-file", str(file)))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("path", ["/", "metrics"])
def test_paths_that_open_everything_are_refused(path: str, parse: Parse, file: Path) -> None:
    with pytest.raises(StartError, match="--open-paths"):
        make_access(parse("m", "--api-key-file", str(file), "--open-paths", path))


def test_vllm_logs_its_own_key_as_stars(parse: Parse, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """Its list of arguments, which it writes at the start."""
    from vllm.entrypoints.serve.utils import api_utils

    told: list[str] = []
    monkeypatch.setattr(api_utils.logger, "info", lambda text, *args: told.append(text % args))
    api_utils.log_non_default_args(parse("m", "--api-key", "secret-1", "secret-2", "--seed", "7"))
    assert "'seed': 7" in told[0] and "'api_key': '***'" in told[0] and "secret" not in "".join(told)
