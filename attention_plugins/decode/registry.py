"""Which selectors there are, and how a request's words become one of them."""

from __future__ import annotations

from functools import cache
from typing import Any

from attention_plugins.decode.base import Selector
from attention_plugins.decode.lessismore import LessIsMore
from attention_plugins.decode.local import LocalOrGlobal
from attention_plugins.decode.loki import Loki
from attention_plugins.decode.quest import Quest
from attention_plugins.decode.recycled import Recycled
from attention_plugins.decode.tidal import Tidal
from kvcache.choosing import choose, with_packages

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
    return with_packages(Selector, BUILT_IN, ENTRY_POINT_GROUP, DENSE)


def make_selector(words: Any) -> Selector | None:
    """Build the selector that a request or the command line asks for.

    Args:
        words: `{"selector": name, **arguments}`, as in a request's `decode_attention` field.

    Returns:
        The selector, or None for `dense`.

    Raises:
        PolicyError: an unknown name or argument, or a bad value; says which and what is allowed.
    """
    chosen = choose(words, FIELD, "selector", DENSE, selectors())
    if chosen is None:
        return None
    selector, args = chosen
    return selector(args)


def selector_words(selector: Selector | None) -> dict[str, Any]:
    """The inverse of `make_selector`, every argument spelled out: JSON-able."""
    if selector is None:
        return {"selector": DENSE}
    return {"selector": selector.name, **selector.args.model_dump(mode="json")}
