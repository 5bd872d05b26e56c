"""`longreach doctor`: what this machine can run, and why not."""

from __future__ import annotations

import os
import platform as python_platform
import shutil
from dataclasses import dataclass
from importlib.metadata import entry_points


@dataclass(frozen=True)
class Finding:
    """One line. `needed`: without it the server can't start at all."""

    ok: bool
    text: str
    needed: bool = True


def examine() -> list[Finding]:
    """Look at Python, vLLM, the platform, memory and the embedded model."""
    findings = [
        Finding(True, f"Python {python_platform.python_version()} on {python_platform.machine()}, {_memory()}"),
    ]
    try:
        import torch
    except ImportError:
        return [*findings, Finding(False, "torch is not installed: pip install 'longreach[cpu]' or 'longreach[cuda]'")]
    findings.append(Finding(True, f"torch {torch.__version__}"))

    from kvcache.vllm_adapter.compat import installed_version, problems

    if installed_version() is None:
        return [*findings, *(Finding(False, text) for text in problems())]

    from server.platforms import NO_DEVICE, detect

    platform = detect()
    found = problems(platform.name)
    findings += [Finding(False, text) for text in found]
    if not found:
        findings.append(Finding(True, f"vLLM {installed_version()}: everything private that Longreach uses is there"))
    findings.append(Finding(platform.name != NO_DEVICE, f"vLLM's platform: {platform.name}"))
    if platform.unavailable:
        findings.append(Finding(False, f"policies, selectors and patterns: {platform.unavailable}", needed=False))
    else:
        from attention_plugins.decode.registry import selectors
        from attention_plugins.prefill.registry import patterns
        from kvcache.registry import policies

        findings.append(Finding(True, f"KV-cache policies: {', '.join(policies())}"))
        findings.append(Finding(True, f"decode selectors: {', '.join(selectors())}"))
        findings.append(Finding(True, f"prefill patterns: {', '.join(patterns())}"))
    findings += [_plugin(), _embedded()]
    return findings


def _memory() -> str:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = shutil.disk_usage(os.path.expanduser("~")).free
    return f"{os.cpu_count()} cores, {pages / 2**30:.0f} GiB memory, {free / 2**30:.0f} GiB free disk"


def _plugin() -> Finding:
    if entry_points(group="vllm.endpoint_plugins", name="longreach"):
        return Finding(True, "vLLM finds Longreach's endpoint plug-in")
    return Finding(False, "vLLM doesn't find Longreach's endpoint plug-in: pip install the package longreach")


def _embedded() -> Finding:
    from server.embedded import EMBEDDED_MODEL_NAME, EmbeddedModelError, find_embedded_model

    try:
        ready = find_embedded_model()
    except EmbeddedModelError as error:
        return Finding(False, f"embedded model: {error}", needed=False)
    return Finding(True, f"embedded model {EMBEDDED_MODEL_NAME}: {ready or 'unpacked at the first start'}")
