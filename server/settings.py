"""Longreach's own settings of the cache: flags beside vLLM's, and the server's default policy that they make."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kvcache.evidence import Evidence
from kvcache.namm import NO_WEIGHTS, Network
from kvcache.policies.base import MOST_SINKS
from kvcache.registry import NONE, PARTS, PolicyError, policies, policy_class, takes
from server.errors import StartError, one_line
from server.flags import KV, in_flags, tell_workers
from server.gates import read_gates
from server.platforms import Platform
from server.policies import HouseRules, PolicyDesk


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--kv-policy` and one `--kv-ARGUMENT` for every argument that some policy takes."""
    group = parser.add_argument_group(
        "KV compression (Longreach)", "The KV-cache policy of requests that name none; `longreach policies` says more."
    )
    group.add_argument(
        "--kv-policy", default=NONE, metavar="NAME", help=f"One of {', '.join([NONE, *policies()])}."
    )  # fmt: skip
    group.add_argument(
        "--kv-namm-weights", default=None, metavar="FILE", help="Trained weights of the policy namm (safetensors)."
    )
    group.add_argument(
        "--kv-always-keep",
        default=HouseRules.always_keep,
        type=int,
        metavar="N",
        help="First tokens of a prompt that every policy keeps; `sinks` can only raise it.",
    )
    group.add_argument(
        "--kv-head-gates",
        default=None,
        metavar="FILE",
        help="Head gates of the model, for requests that bring none: a row a layer, or JSON. (duoattention)",
    )
    for field, known in PARTS.items():
        text = f"Allocator of the budget over {field}; left out, the policy's own. One of {', '.join(known)}."
        KV.add(group, field, text, metavar="NAME")
    takers = [(policy.name, policy.Args) for policy in policies().values()]
    takers += [(part.name, part.Args) for known in PARTS.values() for part in known.values()]
    KV.add_all(group, takers)


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


def house_rules(args: argparse.Namespace) -> HouseRules:
    """What the flags say for every request.

    Raises:
        StartError: a number that is out of bounds, or a file that can't be read.
    """
    if not 0 <= args.kv_always_keep <= MOST_SINKS:
        raise StartError(f"--kv-always-keep: {args.kv_always_keep} tokens; allowed are 0 to {MOST_SINKS}.")
    return HouseRules(args.kv_always_keep, read_gates(args.kv_head_gates) if args.kv_head_gates else None)
