"""`longreach doctor`: what this machine can run, what a model can use there, and why not."""

from __future__ import annotations

import os
import platform as python_platform
import shutil
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any


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


def examine_model(argv: list[str]) -> list[Finding]:
    """Look at a model's configuration, none of its weights, by the rules that a start refuses by.

    Args:
        argv: as of `longreach serve`, with a model.

    Raises:
        StartError: the flags, or the model is none.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    from server.arguments import parse, resolve_model
    from server.errors import StartError, one_line
    from server.platforms import detect, prepare
    from server.refusals import refuse_args

    platform = detect()
    args = parse(argv, platform, "doctor")
    if platform.unavailable:
        return [Finding(False, f"KV-cache policies and decode selectors: {platform.unavailable}")]
    refuse_args(args, compresses=True)
    prepare(args, platform)
    resolve_model(args)
    args.skip_tokenizer_init = True
    try:
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    except (ValueError, OSError, NotImplementedError) as error:
        raise StartError(f"{args.model} can't be served: {one_line(error)}") from error
    return [*_describe(config), *_features(config, platform.name)]


def _describe(config: Any) -> list[Finding]:
    """What the model is."""
    from server.model_layers import layer_kinds

    model, kinds = config.model_config, Counter(layer_kinds(config))
    layers = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    heads, kv_heads = model.model_arch_config.total_num_attention_heads, model.get_total_num_kv_heads()
    return [
        Finding(True, f"{model.architectures[0]}: {sum(kinds.values())} layers ({layers})"),
        Finding(True, f"{heads} query heads on {kv_heads} KV heads of {model.get_head_size()}, {model.dtype}"),
        Finding(True, f"budgets are limits in whole pages, {_page(config)}"),
    ]


def _page(config: Any) -> str:
    if config.model_config.is_hybrid:
        return "which vLLM makes as large as a linear layer's state: a start tells"
    return f"of {config.cache_config.block_size} tokens"


def _features(config: Any, platform: str) -> list[Finding]:
    """What it can use, and why not the rest."""
    from attention_plugins.decode.registry import selectors
    from attention_plugins.prefill.registry import patterns
    from kvcache.registry import policies
    from server.model_layers import full_layers
    from server.rules import PATTERNS, POLICIES, SELECTORS, refused

    number, findings = len(full_layers(config)), []
    for feature, names in ((POLICIES, policies()), (SELECTORS, selectors()), (PATTERNS, patterns())):
        if rules := refused(config, platform, feature):
            told = "; ".join(rule.told(config, platform) for rule in rules)
            findings.append(Finding(False, f"{feature}: not with {told}", needed=feature == POLICIES))
        else:
            findings.append(Finding(True, f"{feature}, on {number} full-attention layers: {', '.join(names)}"))
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
