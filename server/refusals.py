"""What this release doesn't do together with KV compression, refused at start-up by name."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from attention_plugins.decode.settings import DecodeSettings
from server.errors import StartError
from server.rules import POLICIES, SELECTORS, Rule, refused

_BACKENDS = (None, "FLASH_ATTN", "CUSTOM")


class Unsupported(StartError):
    """The asked-for combination is not supported; the message names everything and what to change."""


def refuse_args(args: Namespace, compresses: bool) -> None:
    """Refuse what vLLM's flags alone show.

    Args:
        args: vLLM's arguments.
        compresses: whether policies can run here; without them only what our one server process can't do is refused.

    Raises:
        Unsupported: names the flags.
    """
    found = [
        (args.headless, "--headless"),
        (args.grpc, "--grpc"),
        ((args.api_server_count or 1) > 1, "--api-server-count above 1"),
        (args.data_parallel_multi_port_external_lb, "--data-parallel-multi-port-external-lb"),
        (compresses and args.scheduler_cls is not None, "--scheduler-cls"),
        (compresses and args.worker_cls != "auto", "--worker-cls"),
        (compresses and _backend(args) not in _BACKENDS, f"--attention-backend {_backend(args)}"),
    ]
    if names := [flag for bad, flag in found if bad]:
        raise Unsupported(f"{', '.join(names)}: not supported; leave it out, or use stock `vllm serve`.")


def refuse_config(config: Any, platform: str) -> None:
    """Refuse what only vLLM's resolved configuration (`VllmConfig`) shows.

    Args:
        platform: `cpu` or `cuda`.

    Raises:
        Unsupported: names the features and what to change.
    """
    rules = refused(config, platform, POLICIES)
    if DecodeSettings.of(config.additional_config).selectors:
        rules += [rule for rule in refused(config, platform, SELECTORS) if rule not in rules]
    if names := [_told(rule, config, platform) for rule in rules]:
        raise Unsupported(
            f"not supported with KV compression in this release: {'; '.join(names)}. "
            "Leave it out, choose another model, or use stock `vllm serve`."
        )


def _told(rule: Rule, config: Any, platform: str) -> str:
    told = rule.told(config, platform)
    return told if POLICIES in rule.refuses else f"{SELECTORS} with {told}"


def _backend(args: Namespace) -> str | None:
    """The attention backend that the user asked for."""
    asked = args.attention_backend or args.attention_config.backend
    name = getattr(asked, "name", asked)
    return None if name is None or str(name).lower() == "auto" else str(name).upper()
