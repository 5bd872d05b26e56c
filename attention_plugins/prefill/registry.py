"""Which patterns there are, and how a request's words become one of them."""

from __future__ import annotations

from functools import cache
from typing import Any

from attention_plugins.prefill.anchor import Anchor
from attention_plugins.prefill.base import Pattern
from attention_plugins.prefill.bigbird import BigBird
from attention_plugins.prefill.delta import Delta
from attention_plugins.prefill.flexprefill import FlexPrefill
from attention_plugins.prefill.hip import HiP
from attention_plugins.prefill.minference import MInference
from attention_plugins.prefill.power import Power
from attention_plugins.prefill.streaming import Streaming
from attention_plugins.prefill.strided import Strided
from attention_plugins.prefill.xattention import XAttention
from attention_plugins.prefill.zipvl import ZipVL
from kvcache.choosing import choose, with_packages
from kvcache.method import PolicyError

FIELD = "prefill_attention"
DENSE = "dense"
BUILT_IN: tuple[type[Pattern], ...] = (
    XAttention, FlexPrefill, MInference, Anchor, HiP, ZipVL, Streaming, Delta, Power, Strided, BigBird,
)  # fmt: skip
ENTRY_POINT_GROUP = "longreach.prefill"


@cache
def patterns() -> dict[str, type[Pattern]]:
    """All patterns by name, `dense` not among them: ours, then those of installed packages.

    Raises:
        ValueError: when a package's entry point is no pattern or takes a name that is in use.
    """
    return with_packages(Pattern, BUILT_IN, ENTRY_POINT_GROUP, DENSE)  # type: ignore[type-abstract]


def make_pattern(words: Any, field: str = FIELD) -> Pattern | None:
    """Build the pattern that a request or the command line asks for.

    Args:
        words: `{"pattern": name, **arguments}`, as in a request's `prefill_attention` field.
        field: where they stand, for error messages.

    Returns:
        The pattern, or None for `dense`.

    Raises:
        PolicyError: an unknown name or argument, or a bad value; says which and what is allowed.
    """
    chosen = choose(words, field, "pattern", DENSE, patterns())
    if chosen is None:
        return None
    pattern, args = chosen
    if not issubclass(pattern, Delta):
        return pattern(args)
    assert isinstance(args, Delta.Args)
    base = make_pattern(args.base, f"{field}.base")
    if base is None or base.corrects:
        others = ", ".join(known for known, other in patterns().items() if not other.corrects)
        raise PolicyError(f"{field}.base.pattern", f"{args.base['pattern']!r} can't be corrected.", others)
    return pattern(args, base)


def pattern_words(pattern: Pattern | None) -> dict[str, Any]:
    """The inverse of `make_pattern`, every argument spelled out: JSON-able."""
    if pattern is None:
        return {"pattern": DENSE}
    words = {"pattern": pattern.name, **pattern.args.model_dump(mode="json")}
    return words | {"base": pattern_words(pattern.base)} if isinstance(pattern, Delta) else words
