"""Longreach's settings of prefill: the server's default pattern."""

from __future__ import annotations

import argparse
from pathlib import Path

from attention_plugins.prefill.registry import DENSE, patterns
from kvcache.method import PolicyError
from server.calibration import read_head_tables
from server.errors import StartError
from server.flags import PREFILL, in_flags, tell_workers
from server.patterns import PatternDesk
from server.platforms import Platform


def add_prefill_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--prefill-attention` and one `--prefill-ARGUMENT` for every argument that some pattern takes."""
    group = parser.add_argument_group(
        "Sparse prefill (Longreach)", "What is computed of a prompt's attention; `longreach patterns` says more."
    )
    group.add_argument(
        "--prefill-attention",
        default=DENSE,
        metavar="NAME",
        help=f"Pattern of requests that name none. One of {', '.join([DENSE, *patterns()])}.",
    )
    group.add_argument(
        "--prefill-calibration",
        default=None,
        metavar="FILE",
        help="Tables that `longreach calibrate` has made of the model (safetensors). (minference)",
    )
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
    pattern_desk(args, platform)
    if args.prefill_calibration is None:
        return
    file = Path(args.prefill_calibration).expanduser().resolve()
    read_head_tables(file)
    if platform.unavailable is None:
        tell_workers(args, prefill={"calibration": str(file)})
