"""Longreach's settings of prefill: the server's default pattern."""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_plugins.prefill.registry import DENSE, patterns
from kvcache.method import PolicyError
from server.calibration import read_head_tables
from server.errors import StartError
from server.flags import PREFILL, add_setting, in_flags, tell_workers
from server.patterns import PatternDesk
from server.platforms import Platform

ALL, NONE = "all", "none"


def add_prefill_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--prefill-attention` and one `--prefill-ARGUMENT` for every argument that some pattern takes."""
    group = parser.add_argument_group(
        "Patterns", "What is computed of a prompt's attention; `longreach patterns` lists them."
    )
    names = [DENSE, *patterns()]
    text = f"Pattern of requests that name none. One of {', '.join(names)}."
    add_setting(group, "--prefill-attention", text, default=DENSE, metavar="NAME", names=names)
    text = "Tables that `longreach calibrate --prefill` has made of the model (safetensors). (minference)"
    add_setting(group, "--prefill-calibration", text, metavar="FILE")
    text = f"Patterns whose GPU kernels are compiled at the start, `{ALL}` or `{NONE}`; the first request with another \
one waits some seconds for that. Left out: that of --prefill-attention alone."
    add_setting(group, "--prefill-warm-up", text, nargs="+", metavar="NAME", names=[*patterns(), ALL, NONE])
    group = parser.add_argument_group("PatternArguments", "Arguments of --prefill-attention, as requests have them.")
    PREFILL.add_all(group, [(pattern.name, pattern.Args) for pattern in patterns().values()])


def pattern_desk(args: argparse.Namespace, platform: Platform) -> PatternDesk:
    """What requests may ask of this server, from the flags.

    Raises:
        StartError: a flag is wrong, or patterns can't run here; the message says what is allowed.
    """
    given, name = PREFILL.given(args), args.prefill_attention
    if name == DENSE and given:
        raise StartError(
            f"{PREFILL.flags(given)} without a pattern to take it: add --prefill-attention NAME, one of "
            f"{', '.join(patterns())}."
        )
    if name in patterns():
        PREFILL.refuse_foreign(given, list(patterns()[name].Args.model_fields), f"the pattern {name}")
    try:
        return PatternDesk({"pattern": name, **given}, platform.unavailable)
    except PolicyError as error:
        raise StartError(in_flags(error)) from None


def pass_patterns(args: argparse.Namespace, platform: Platform) -> None:
    """Put what workers have to know of patterns where they look for it, in place.

    Raises:
        StartError: a flag is wrong, a pattern can't run here, or the calibration can't be read.
    """
    desk, file = pattern_desk(args, platform), None
    if args.prefill_calibration is not None:
        file = str(Path(args.prefill_calibration).expanduser().resolve())
        read_head_tables(file)
    warm = _warm_up(args.prefill_warm_up, desk.default["pattern"])
    if platform.unavailable is None:
        tell_workers(args, prefill={"calibration": file, "warm_up": warm})


def _warm_up(named: list[str] | None, default: str) -> list[str]:
    """
    Raises:
        StartError: a name that no pattern has.
    """
    known = list(patterns())
    if named is None:
        return [name for name in known if name == default]
    if named in ([ALL], [NONE]):
        return known if named == [ALL] else []
    if unknown := [name for name in named if name not in known]:
        raise StartError(f"--prefill-warm-up: {', '.join(unknown)}: there are {', '.join([*known, ALL, NONE])}.")
    return named
