"""The start of the server around vLLM's: addresses, plug-ins, models that can't be served, and stopping."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, Field, ValidationError

from server import app
from server.app import allow_plugin, serve
from server.arguments import resolve_model
from server.draining import Door
from server.errors import StartError, one_line
from server.platforms import Platform, prepare
from server.policies import PolicyDesk
from server.refusals import Unsupported
from tests.server.asgi import desks
from tests.server.test_refusals import LLAMA, MISTRAL

CPU = Platform("cpu", None)
DESKS = desks(PolicyDesk({"policy": "random"}, 32))
DESK = DESKS.policies
Parse = Callable[..., Namespace]


class FakeEngine:
    """Enough of an engine client for vLLM to listen; `log` is what was done with it."""

    desks = DESKS
    model_config = SimpleNamespace(max_model_len=512, get_pooling_task=lambda tasks: None)
    errored = is_running = False
    vllm_config = SimpleNamespace(shutdown_timeout=0, model_config=None)
    drained = True

    def __init__(self) -> None:
        self.log: list[str] = []
        self.door = Door()

    async def reset_mm_cache(self) -> None:
        self.log.append("reset")

    missing: tuple[dict[str, str], ...] = ({}, {})

    async def collective_rpc(self, method: str) -> list[dict[str, str]]:
        self.log.append(method)
        return list(self.missing)

    async def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    def shutdown(self, timeout: float | None = None) -> None:
        self.log.append("shutdown")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`serve` changes the environment and installs signal handlers; pytest wants its own back."""
    monkeypatch.setenv("VLLM_PLUGINS", "")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    """An engine that is already there, in an application with our plug-in's state alone."""
    from vllm.entrypoints.launchers.api_server import entry
    from vllm.plugins.endpoint_plugins.interface import init_endpoint_plugins_state

    engine = FakeEngine()
    monkeypatch.setattr(app, "_start_engine", lambda *_: engine)

    async def init(client: Any, state: Any, args: Namespace, tasks: Any) -> None:
        state.engine_client, state.log_stats, state.args = client, False, args
        await init_endpoint_plugins_state(client, state, args)

    monkeypatch.setattr(entry, "init_app_state", init)
    return engine


def ask(args: Namespace, use: Callable[[], Any]) -> Any:
    """Serve, call `use` in a thread until it connects, and stop the server as `docker stop` does."""

    async def run() -> Any:
        server = asyncio.create_task(serve(args, DESK.default, CPU))
        for _ in range(200):
            await asyncio.sleep(0.05)
            try:
                answer = await asyncio.to_thread(use)
                break
            except httpx.TransportError:
                assert not server.done()
        else:
            pytest.fail("it never listened")
        os.kill(os.getpid(), signal.SIGTERM)
        await server
        return answer

    return asyncio.run(run())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_it_listens_on_a_socket_file(parse: Parse, engine: FakeEngine, tmp_path: Path) -> None:
    path = str(tmp_path / "http")
    with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://longreach") as client:
        answer = ask(parse("m", "--uds", path), lambda: client.get("/v1/kv/policies"))
    assert answer.json() == DESK.describe()
    assert engine.log[:2] == ["missing_evidence", "reset"] and "shutdown" in engine.log


def test_a_default_policy_that_the_model_has_no_evidence_for_ends_the_start(
    parse: Parse, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any worker may say so."""
    monkeypatch.setattr(engine, "desks", desks(PolicyDesk({"policy": "expectedattention"}, 32)))
    monkeypatch.setattr(engine, "missing", ({}, {"query moments": "it has no rotary embedding"}))
    with pytest.raises(StartError, match=r"--kv-policy: .*has no rotary embedding.* Allowed: none, .*snapkv"):
        asyncio.run(serve(parse("m", "--port", str(free_port())), engine.desks.policies.default, CPU))
    assert engine.log[-1] == "shutdown"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_it_speaks_tls_and_wants_its_key(parse: Parse, engine: FakeEngine, tmp_path: Path) -> None:
    key, certificate, port = tmp_path / "key.pem", tmp_path / "cert.pem", free_port()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-keyout", key, "-out", certificate], check=True, capture_output=True,
    )  # fmt: skip
    args = parse("m", "--port", str(port), "--ssl-keyfile", str(key), "--ssl-certfile", str(certificate),
                 "--api-key", "secret")  # fmt: skip
    # Without a pool: an idle TLS connection would hold the stop up for 30 s, as with stock uvicorn.
    answer = ask(args, lambda: httpx.get(f"https://127.0.0.1:{port}/v1/kv/policies", verify=False))
    assert answer.status_code == 401


def test_a_failing_application_ends_the_engine(
    parse: Parse, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(app, "build_and_serve", fail)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(serve(parse("m", "--port", str(free_port())), DESK.default, CPU))
    assert engine.log == ["missing_evidence", "reset", "shutdown"]


def test_an_address_in_use_is_told_before_the_engine_starts(
    parse: Parse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(app, "_start_engine", lambda *_: pytest.fail("started"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        with pytest.raises(
            StartError, match=rf"can't listen: --host 127\.0\.0\.1 --port {port}: Address already in use"
        ):
            asyncio.run(serve(parse("m", "--port", port), DESK.default, CPU))
    left = tmp_path / "http"
    left.touch()
    with pytest.raises(StartError, match=f"can't listen: --uds {left}: Address already in use"):
        asyncio.run(serve(parse("m", "--uds", str(left)), DESK.default, CPU))
    with pytest.raises(StartError, match=r"can't listen: .* --port 99999: .* 0-65535"):
        asyncio.run(serve(parse("m", "--port", "99999"), DESK.default, CPU))
    with pytest.raises(StartError, match="invalid tool call parser: nonsense"):
        args = parse("m", "--enable-auto-tool-choice", "--tool-call-parser", "nonsense")
        asyncio.run(serve(args, DESK.default, CPU))


@pytest.mark.parametrize(
    ("content", "flags", "error", "words"),
    [
        ({**LLAMA, "architectures": ["NoSuchForCausalLM"]}, (), StartError, "can't be served: .*NoSuchForCausalLM"),
        (LLAMA, ("--max-model-len", "9999"), StartError, "can't be served: .*9999"),
        (MISTRAL, (), Unsupported, "models without a full-attention layer"),
        (LLAMA, ("--block-size", "64"), StartError, "--kv-budget: 110 is too small"),
    ],
    ids=["architecture", "length", "refused", "budget"],
)
def test_models_that_cannot_be_served(
    parse: Parse, tmp_path: Path, content: dict[str, Any], flags: tuple[str, ...], error: type[Exception], words: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    args = parse(str(tmp_path), "--load-format", "dummy", "--skip-tokenizer-init", "--port", str(free_port()), *flags)
    resolve_model(args)
    prepare(args, CPU)
    with pytest.raises(error, match=words) as caught:
        asyncio.run(serve(args, {"policy": "streamingllm", "budget": 110}, CPU))
    assert "\n" not in str(caught.value)


def test_an_engine_that_dies_at_its_start(parse: Parse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = SimpleNamespace(
        instance_id="dies",
        cache_config=SimpleNamespace(block_size=32, sliding_window=None),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        model_config=SimpleNamespace(
            served_model_name="m",
            get_total_num_hidden_layers=lambda: 2,
            get_total_num_kv_heads=lambda: 1,
            is_attention_free=False,
            hf_text_config=SimpleNamespace(),
        ),
    )
    monkeypatch.setattr("server.app.AsyncEngineArgs.create_engine_config", lambda *_, **__: config)
    errors: list[Exception] = [RuntimeError("Engine core initialization failed. See root cause above."),
                               OSError("no tokenizer"), RuntimeError("a bug")]  # fmt: skip

    def start(**_: Any) -> None:
        raise errors[0]

    monkeypatch.setattr("server.app.LongreachLLM.from_vllm_config", start)
    stock = Platform("cuda", "no adapter")
    for error, text in ((StartError, "the engine didn't start"), (StartError, "no tokenizer"), (RuntimeError, "a bug")):
        with pytest.raises(error, match=text):
            asyncio.run(serve(parse("owner/name", "--port", str(free_port())), {"policy": "none"}, stock))
        errors.pop(0)


class Taken(Exception):
    """The engine would start now."""


@pytest.mark.parametrize(
    ("platform", "asynchronous", "scheduler"),
    [
        (CPU, True, "kvcache.vllm_adapter.scheduler.AsyncCompressionScheduler"),
        (CPU, False, "kvcache.vllm_adapter.scheduler.CompressionScheduler"),
        (Platform("cpu", "tests say so"), True, None),
        (Platform("cpu", "tests say so"), False, None),
    ],
)
def test_the_engine_gets_the_scheduler_that_fits(
    parse: Parse,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    platform: Platform,
    asynchronous: bool,
    scheduler: str | None,
) -> None:
    """Our own, and only where policies can run."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    create, configs = AsyncEngineArgs.create_engine_config, []

    def resolve(*args: Any, **kwargs: Any) -> Any:
        config = create(*args, **kwargs)
        config.scheduler_config.async_scheduling = asynchronous  # what vLLM makes of it depends on the platform
        return config

    def start(vllm_config: Any, **_: Any) -> None:
        configs.append(vllm_config)
        raise Taken

    monkeypatch.setattr(AsyncEngineArgs, "create_engine_config", resolve)
    monkeypatch.setattr("server.app.LongreachLLM.from_vllm_config", start)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    args = parse(str(tmp_path), "--load-format", "dummy", "--skip-tokenizer-init", "--port", str(free_port()))
    prepare(args, platform)
    with pytest.raises(Taken):
        asyncio.run(serve(args, {"policy": "none"}, platform))
    assert [config.scheduler_config.scheduler_cls for config in configs] == [scheduler]


def test_the_configuration_is_refused_as_on_its_platform(
    parse: Parse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    args = parse(str(tmp_path), "--load-format", "dummy", "--skip-tokenizer-init", "--port", str(free_port()))
    args.block_size = 32
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(Unsupported, match="vLLM's other model runner"):
        asyncio.run(serve(args, {"policy": "none"}, Platform("cuda", None)))


def test_told_to_stop_while_the_engine_starts(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM waits for the engine where exceptions of signal handlers are swallowed, but sees it die."""

    def start(*_: Any) -> None:
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
        child.start()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            pass
        child.join(30)
        assert child.exitcode == -signal.SIGTERM
        raise StartError("the engine didn't start")

    monkeypatch.setattr(app, "_start_engine", start)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(serve(parse("m", "--port", str(free_port())), DESK.default, CPU))


@pytest.mark.parametrize(
    ("before", "after"),
    [("", {"longreach"}), ("mine", {"longreach", "mine"}), ("longreach,mine", {"longreach", "mine"})],
)
def test_a_list_of_allowed_plug_ins_is_kept(monkeypatch: pytest.MonkeyPatch, before: str, after: set[str]) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", before)
    allow_plugin()
    assert set(os.environ["VLLM_PLUGINS"].split(",")) == after


def test_without_a_list_all_stay_allowed_but_what_needs_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS")
    allow_plugin()
    allowed = set(os.environ["VLLM_PLUGINS"].split(","))
    installed = {entry.name for entry in entry_points(group="vllm.general_plugins")}
    assert "lora_hf_hub_resolver" in installed  # else vLLM has renamed it
    assert allowed >= (installed | {"longreach"}) - {"lora_hf_hub_resolver"}
    assert "lora_hf_hub_resolver" not in allowed


def test_without_our_entry_point_nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "entry_points", lambda **_: ())
    with pytest.raises(StartError, match="the package longreach is not installed"):
        allow_plugin()


def _wrong_twice() -> ValidationError:
    class Config(BaseModel):
        page_size: int = Field(ge=1)
        name: str

    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"page_size": 0})
    return caught.value


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (KeyError("no 'such' parser"), "no 'such' parser"),
        (FileNotFoundError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (_wrong_twice(), "page_size: Input should be greater than or equal to 1; name: Field required"),
    ],
)
def test_messages_are_one_line(error: Exception, text: str) -> None:
    assert one_line(error) == text
