"""Which patterns there are, and how a request's words become one of them."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

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
from kvcache.method import PolicyError, explain

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
    found = {pattern.name: pattern for pattern in BUILT_IN}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        pattern = entry.load()
        if not (isinstance(pattern, type) and issubclass(pattern, Pattern)):
            raise ValueError(f"entry point {entry.name} of {ENTRY_POINT_GROUP} is not a Pattern: {pattern!r}")
        if pattern.name == DENSE or found.get(pattern.name, pattern) is not pattern:
            raise ValueError(f"entry point {entry.name}: the pattern name {pattern.name!r} is taken")
        found[pattern.name] = pattern
    return found


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
    if not isinstance(words, dict):
        raise PolicyError(field, f"must be an object, got {words!r}.", '{"pattern": NAME, ...}')
    name = words.get("pattern")
    if name == DENSE:
        if extra := sorted(set(words) - {"pattern"}):
            raise PolicyError(f"{field}.{extra[0]}", "the pattern 'dense' takes no arguments.", "no further fields")
        return None
    if not isinstance(name, str) or name not in patterns():
        problem = "is missing." if "pattern" not in words else f"unknown pattern {name!r}."
        raise PolicyError(f"{field}.pattern", problem, ", ".join([DENSE, *patterns()]))
    pattern = patterns()[name]
    try:
        args = pattern.Args.model_validate({k: v for k, v in words.items() if k != "pattern"})
    except ValidationError as error:
        raise explain(field, name, pattern.Args, list(pattern.Args.model_fields), error) from None
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
