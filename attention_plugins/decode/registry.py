"""Which selectors there are, and how a request's words become one of them."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

from attention_plugins.decode.base import Selector
from attention_plugins.decode.lessismore import LessIsMore
from attention_plugins.decode.local import LocalOrGlobal
from attention_plugins.decode.loki import Loki
from attention_plugins.decode.quest import Quest
from attention_plugins.decode.recycled import Recycled
from attention_plugins.decode.tidal import Tidal
from kvcache.method import PolicyError, explain

FIELD = "decode_attention"
DENSE = "dense"
BUILT_IN: tuple[type[Selector], ...] = (Recycled, Tidal, LessIsMore, Quest, Loki, LocalOrGlobal)
ENTRY_POINT_GROUP = "longreach.decode"


@cache
def selectors() -> dict[str, type[Selector]]:
    """All selectors by name, `dense` not among them: ours, then those of installed packages.

    Raises:
        ValueError: when a package's entry point is no selector or takes a name that is in use.
    """
    found = {selector.name: selector for selector in BUILT_IN}
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        selector = entry.load()
        if not (isinstance(selector, type) and issubclass(selector, Selector)):
            raise ValueError(f"entry point {entry.name} of {ENTRY_POINT_GROUP} is not a Selector: {selector!r}")
        if selector.name == DENSE or found.get(selector.name, selector) is not selector:
            raise ValueError(f"entry point {entry.name}: the selector name {selector.name!r} is taken")
        found[selector.name] = selector
    return found


def make_selector(words: Any) -> Selector | None:
    """Build the selector that a request or the command line asks for.

    Args:
        words: `{"selector": name, **arguments}`, as in a request's `decode_attention` field.

    Returns:
        The selector, or None for `dense`.

    Raises:
        PolicyError: an unknown name or argument, or a bad value; says which and what is allowed.
    """
    if not isinstance(words, dict):
        raise PolicyError(FIELD, f"must be an object, got {words!r}.", '{"selector": NAME, ...}')
    name = words.get("selector")
    if name == DENSE:
        if extra := sorted(set(words) - {"selector"}):
            raise PolicyError(f"{FIELD}.{extra[0]}", "the selector 'dense' takes no arguments.", "no further fields")
        return None
    if not isinstance(name, str) or name not in selectors():
        problem = "is missing." if "selector" not in words else f"unknown selector {name!r}."
        raise PolicyError(f"{FIELD}.selector", problem, ", ".join([DENSE, *selectors()]))
    selector = selectors()[name]
    try:
        return selector(selector.Args.model_validate({k: v for k, v in words.items() if k != "selector"}))
    except ValidationError as error:
        raise explain(FIELD, name, selector.Args, list(selector.Args.model_fields), error) from None


def selector_words(selector: Selector | None) -> dict[str, Any]:
    """The inverse of `make_selector`, every argument spelled out: JSON-able."""
    if selector is None:
        return {"selector": DENSE}
    return {"selector": selector.name, **selector.args.model_dump(mode="json")}
