"""Longreach's settings of decoding: the server's default selector, and those that requests may use."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from attention_plugins.decode.registry import DENSE, selectors
from attention_plugins.decode.settings import STATES
from kvcache.method import PolicyError
from server.calibration import read_calibration
from server.desks import clash, companions
from server.errors import StartError
from server.flags import DECODE, add_setting, in_flags, tell_workers
from server.platforms import Platform
from server.selectors import SelectorDesk

ALL, NONE = "all", "none"


def add_decode_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--decode-attention`, what servers decide for all requests, and one `--decode-ARGUMENT` for every argument
    that some selector takes."""
    group = parser.add_argument_group(
        "Selectors", "What each step of decoding reads of the KV cache; `longreach selectors` lists them."
    )
    names = [DENSE, *selectors()]
    text = f"Selector of requests that name none. One of {', '.join(names)}."
    add_setting(group, "--decode-attention", text, default=DENSE, metavar="NAME", names=names)
    text = f"Selectors that requests may use, `{ALL}` or `{NONE}`. Left out: that of --decode-attention alone."
    add_setting(group, "--decode-selectors", text, nargs="+", metavar="NAME", names=[*selectors(), ALL, NONE])
    text = "Most requests at once that select, and that selectors remember; others read everything."
    add_setting(group, "--decode-states", text, default=STATES, type=int, metavar="N")
    text = "What `longreach calibrate` has measured of the model (safetensors)."
    add_setting(group, "--decode-calibration", text, metavar="FILE")
    group = parser.add_argument_group("SelectorArguments", "Arguments of --decode-attention, as requests have them.")
    DECODE.add_all(group, [(selector.name, selector.Args) for selector in selectors().values()])


def selector_desk(args: argparse.Namespace, platform: Platform) -> SelectorDesk:
    """What requests may ask of this server, from the flags.

    Raises:
        StartError: a flag is wrong, or a selector can't run here; the message says what is allowed.
    """
    given = DECODE.given(args)
    name = args.decode_attention
    if name == DENSE and given:
        raise StartError(
            f"{DECODE.flags(given)} without a selector to take it: add --decode-attention NAME, one of "
            f"{', '.join(selectors())}."
        )
    if name in selectors():
        DECODE.refuse_foreign(given, list(selectors()[name].Args.model_fields), f"the selector {name}")
    if args.decode_states < 1:
        raise StartError(f"--decode-states: {args.decode_states} requests; allowed is 1 or more.")
    rules: dict[str, Any] = {
        "states": args.decode_states,
        "calibrated": args.decode_calibration is not None,
        "tensor_parallel": args.tensor_parallel_size,
    }
    enabled = _enabled(args, SelectorDesk(unavailable=platform.unavailable, **rules))
    try:
        return SelectorDesk({"selector": name, **given}, enabled, platform.unavailable, **rules)
    except PolicyError as error:
        raise StartError(in_flags(error)) from None


def _enabled(args: argparse.Namespace, desk: SelectorDesk) -> list[str]:
    """Selectors that requests may use.

    Args:
        desk: knows what this server lacks.

    Raises:
        StartError: one is named that doesn't exist or can't run here.
    """
    known, named = selectors(), args.decode_selectors
    if named is None:
        usual = known.get(args.decode_attention)
        return [usual.name] if usual and not desk.unavailable and desk.needs(usual) is None else []
    if named == [NONE]:
        return []
    chosen = list(known) if named == [ALL] else named
    if unknown := [name for name in chosen if name not in known]:
        raise StartError(f"--decode-selectors: {', '.join(unknown)}: there are {', '.join([*known, ALL, NONE])}.")
    if desk.unavailable:
        raise StartError(f"--decode-selectors: not available: {desk.unavailable}. Allowed: {NONE}.")
    for name in chosen:
        if reason := desk.needs(known[name]):
            others = [each for each in known if desk.needs(known[each]) is None]
            raise StartError(f"--decode-selectors: {name} {reason}. Others: {' '.join(others)}.")
    return [name for name in known if name in chosen]


def pass_selectors(args: argparse.Namespace, platform: Platform, policy: dict[str, Any]) -> None:
    """Put what workers and the scheduler have to know of selectors where they look for it, in place.

    Args:
        policy: the server's default policy, every argument spelled out.

    Raises:
        StartError: a flag is wrong, a selector can't run here or not with that policy, or the calibration can't be
            read.
    """
    desk = selector_desk(args, platform)
    if clash(policy, desk.default):
        raise StartError(
            f"--decode-attention: {desk.default['selector']} needs a whole cache, which --kv-policy {policy['policy']} "
            f"compresses. Allowed: {companions()}; or --kv-policy none."
        )
    file = None
    if args.decode_calibration:
        file = str(Path(args.decode_calibration).expanduser().resolve())
        read_calibration(file)
    if platform.unavailable is None:
        tell_workers(args, decode={"selectors": list(desk.enabled), "states": desk.states, "calibration": file})
