"""Longreach's own settings of the cache: flags beside vLLM's, and the server's default policy that they make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kvcache.evidence import Evidence
from kvcache.method import Arguments
from kvcache.namm import NO_WEIGHTS, Network
from kvcache.policies.base import MOST_SINKS
from kvcache.registry import NONE, PARTS, PolicyError, policies, policy_class, takes
from server.errors import StartError, one_line
from server.flags import KV, add_setting, in_flags, tell_workers
from server.gates import read_gates
from server.platforms import Platform
from server.policies import HouseRules, PolicyDesk


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--kv-policy`, what servers decide for all requests, and one `--kv-ARGUMENT` for every argument that some
    policy takes."""
    group = parser.add_argument_group(
        "Policies", "What stays in the KV cache, for requests that don't say; `longreach policies` lists them."
    )
    names = [NONE, *policies()]
    text = f"Policy of requests that name none. One of {', '.join(names)}."
    add_setting(group, "--kv-policy", text, default=NONE, metavar="NAME", names=names)
    text = "Trained weights of the policy namm (safetensors)."
    add_setting(group, "--kv-namm-weights", text, metavar="FILE")
    text = "First tokens of a prompt that every policy keeps, in every request; its `sinks` can only raise it."
    add_setting(group, "--kv-always-keep", text, default=HouseRules.always_keep, type=int, metavar="N")
    text = "Head gates of the model, for requests that bring none: a row a layer, or JSON. (duoattention)"
    add_setting(group, "--kv-head-gates", text, metavar="FILE")
    text = "Check every N steps that all blocks and page tables are accounted for, or end the engine. 0: never."
    add_setting(group, "--kv-audit", text, default=0, type=int, metavar="N")
    for field, known in PARTS.items():
        text = f"Allocator of the budget over {field}; left out, the policy's own. One of {', '.join(known)}."
        KV.add(group, field, text, metavar="NAME", names=known)
    group = parser.add_argument_group("PolicyArguments", "Arguments of --kv-policy, as requests have them.")
    KV.add_all(group, policy_arguments())


def policy_arguments() -> list[tuple[str, type[Arguments]]]:
    """What policies and allocators take, by name."""
    takers: list[tuple[str, type[Arguments]]] = [(policy.name, policy.Args) for policy in policies().values()]
    return takers + [(part.name, part.Args) for known in PARTS.values() for part in known.values()]


def default_policy(args: argparse.Namespace, platform: Platform) -> dict[str, Any]:
    """The server's default policy from the flags, every argument spelled out.

    Args:
        args: parsed flags; `block_size` decides the smallest budget.
        platform: where we run.

    Raises:
        StartError: a flag is wrong, or the policy can't run here; the message says what is allowed.
    """
    given = KV.given(args)
    if args.kv_policy == NONE and given:
        raise StartError(
            f"{KV.flags(given)} without a policy to take it: add --kv-policy NAME, one of {', '.join(policies())}."
        )
    words = {"policy": args.kv_policy, **given}
    try:
        if args.kv_policy in policies():
            KV.refuse_foreign(given, takes(policy_class(words)), f"the policy {args.kv_policy}")
        desk = PolicyDesk(words, args.block_size or 1, platform.unavailable, house_rules(args))
        desk.lacks({} if args.kv_namm_weights else {Evidence.SPECTROGRAMS.value: NO_WEIGHTS})
        return desk.default
    except PolicyError as error:
        raise StartError(in_flags(error)) from None


def pass_weights(args: argparse.Namespace) -> None:
    """Put the file of NAMM's weights where workers look for it (`additional_config`), in place.

    Raises:
        StartError: it doesn't hold them.
    """
    if args.kv_namm_weights is None:
        return
    file = str(Path(args.kv_namm_weights).expanduser().resolve())
    try:
        Network.load(file)
    except ValueError as error:
        raise StartError(f"--kv-namm-weights: {one_line(error)}") from None
    tell_workers(args, namm_weights=file)


def pass_audit(args: argparse.Namespace) -> None:
    """Tell scheduler and workers how often to check themselves, in place.

    Raises:
        StartError: a negative number of steps.
    """
    if args.kv_audit < 0:
        raise StartError(f"--kv-audit: {args.kv_audit} steps; allowed are 0 (never) and more.")
    if args.kv_audit:
        tell_workers(args, audit=args.kv_audit)


def house_rules(args: argparse.Namespace) -> HouseRules:
    """What the flags say for every request.

    Raises:
        StartError: a number that is out of bounds, or a file that can't be read.
    """
    if not 0 <= args.kv_always_keep <= MOST_SINKS:
        raise StartError(f"--kv-always-keep: {args.kv_always_keep} tokens; allowed are 0 to {MOST_SINKS}.")
    return HouseRules(args.kv_always_keep, read_gates(args.kv_head_gates) if args.kv_head_gates else None)
