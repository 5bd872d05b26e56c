"""What the server makes of the machine: which platforms compress, and what vLLM is told there."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server import arguments
from server.platforms import NO_DEVICE, PAGE_SIZES, Platform, choose_scheduler, detect, prepare
from tests.server.test_refusals import LLAMA

CPU, CUDA = Platform("cpu", None), Platform("cuda", None)
UNABLE = Platform("cuda", "policies need another GPU")
SCHEDULERS = {True: "AsyncCompressionScheduler", False: "CompressionScheduler"}
Parse = Callable[..., Namespace]


def see(monkeypatch: pytest.MonkeyPatch, kind: str, capability: tuple[int, int] | None = None) -> None:
    """Let vLLM see a platform of its own of this kind, with GPUs of this compute capability."""
    from vllm import platforms
    from vllm.platforms.interface import DeviceCapability, PlatformEnum
    from vllm.platforms.interface import Platform as Interface

    class Seen(Interface):
        _enum = PlatformEnum[kind]
        device_type = kind.lower()

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(*capability) if capability else None

    monkeypatch.setattr(platforms, "current_platform", Seen(), raising=False)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (9, 9)])
def test_gpus_that_compress(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    see(monkeypatch, "CUDA", capability)
    assert detect() == Platform("cuda", None)


@pytest.mark.parametrize(
    ("capability", "words"),
    [
        ((7, 0), "8.0 (Ampere) or newer"),
        ((7, 5), "8.0 (Ampere) or newer"),
        (None, "8.0 (Ampere) or newer"),
        ((10, 0), "newer ones (Blackwell)"),
        ((10, 3), "newer ones (Blackwell)"),
        ((11, 0), "newer ones (Blackwell)"),
        ((12, 0), "newer ones (Blackwell)"),
    ],
)
def test_gpus_that_do_not_and_why(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, words: str
) -> None:
    see(monkeypatch, "CUDA", capability)
    found = detect()
    assert found.name == "cuda"
    assert found.unavailable is not None
    assert words in found.unavailable and "FlashAttention" in found.unavailable and "\n" not in found.unavailable


def test_other_platforms(monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, "CPU")
    assert detect() == CPU
    see(monkeypatch, "ROCM", (9, 4))
    assert detect() == Platform("rocm", "this release has no adapter for vLLM's platform rocm")
    see(monkeypatch, "UNSPECIFIED")
    found = detect()
    assert found.name == NO_DEVICE and "no device" in (found.unavailable or "")


def test_cpus_get_our_classes(parse: Parse) -> None:
    args = parse("m")
    prepare(args, CPU)
    assert (args.worker_cls, args.block_size) == ("attention_plugins.vllm_adapter.cpu_worker.CPUCompressionWorker", 32)
    assert (args.scheduler_cls, args.attention_backend) == (None, None)
    assert args.compilation_config.custom_ops == ["none"]

    args = parse("m", "--block-size", "64", "-cc.custom_ops+=all")
    prepare(args, CPU)
    assert (args.block_size, args.compilation_config.custom_ops) == (64, ["all"])


@pytest.mark.parametrize(
    ("argv", "machine", "avx512", "dtype"),
    [
        ((), "x86_64", False, "float32"),
        (("gemma3-270m",), "x86_64", False, "float32"),
        ((), "x86_64", True, "auto"),
        ((), "aarch64", False, "auto"),
        (("--dtype", "bfloat16"), "x86_64", False, "bfloat16"),
        (("--kv-cache-memory-bytes", "300M"), "x86_64", False, "auto"),
        (("m",), "x86_64", False, "auto"),
    ],
)
def test_embedded_models_where_bfloat16_is_emulated(
    parse: Parse, monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], machine: str, avx512: bool, dtype: str
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.cpu._is_avx512_supported", lambda: avx512)
    args = parse(*argv)
    prepare(args, CPU)
    assert args.dtype == dtype


@pytest.mark.usefixtures("flash_attention")
def test_gpus_get_our_classes() -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.worker.gpu_worker import Worker

    assert not AttentionBackendEnum.CUSTOM.is_overridden()
    args = arguments.parse(["m"], CUDA)
    prepare(args, CUDA)
    assert (args.attention_backend, args.block_size) == (AttentionBackendEnum.CUSTOM, 16)
    assert (args.scheduler_cls, args.enforce_eager, args.compilation_config.custom_ops) == (None, False, [])

    from attention_plugins.vllm_adapter.cuda_backend import CUDACompressedBackend
    from attention_plugins.vllm_adapter.worker import CompressionWorker

    assert AttentionBackendEnum.CUSTOM.get_class() is CUDACompressedBackend
    worker = resolve_obj_by_qualname(args.worker_cls)
    assert issubclass(worker, CompressionWorker) and issubclass(worker, Worker)
    assert worker.__module__ == "attention_plugins.vllm_adapter.cuda_worker"

    args = arguments.parse(["m", "--block-size", "32"], CUDA)
    prepare(args, CUDA)
    assert args.block_size == 32


@pytest.mark.usefixtures("flash_attention")
@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("--attention-backend", "FLASH_ATTN"),
        ("--attention-config.backend", "FLASH_ATTN"),
    ],
    ids=lambda argv: "-".join(argv) or "none",
)
def test_vllm_takes_our_backend_for_gpus(tmp_path: Path, argv: tuple[str, ...]) -> None:
    """However the user asked for FlashAttention, which it is."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    flags = ["--load-format", "dummy", "--skip-tokenizer-init", "--enforce-eager"]
    args = arguments.parse([str(tmp_path), *flags, *argv], CUDA)
    prepare(args, CUDA)
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    assert config.attention_config.backend is AttentionBackendEnum.CUSTOM
    assert config.parallel_config.worker_cls == args.worker_cls
    assert config.cache_config.block_size == PAGE_SIZES["cuda"]


def test_where_nothing_compresses_vllm_stays_as_it_is() -> None:
    for platform in (UNABLE, Platform("rocm", "no adapter")):
        args, untouched = (arguments.parse(["m"], platform) for _ in range(2))
        prepare(args, platform)
        assert vars(args) == vars(untouched)
        assert (args.worker_cls, args.scheduler_cls, args.attention_backend) == ("auto", None, None)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_scheduler_is_the_one_that_vllm_wants(asynchronous: bool) -> None:
    from vllm.config import SchedulerConfig
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from kvcache.vllm_adapter import scheduler

    scheduling = SchedulerConfig(max_model_len=512, is_encoder_decoder=False, async_scheduling=asynchronous)
    choose_scheduler(SimpleNamespace(scheduler_config=scheduling))
    chosen = scheduling.get_scheduler_cls()
    assert chosen is getattr(scheduler, SCHEDULERS[asynchronous])
    assert issubclass(chosen, Scheduler) and issubclass(chosen, AsyncScheduler) is asynchronous
