"""Selectors of installed packages."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from attention_plugins.decode.quest import Quest
from attention_plugins.decode.registry import ENTRY_POINT_GROUP, make_selector, selector_words, selectors


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def pretend(thing: Any) -> None:
        entry = EntryPoint("theirs", "package:thing", ENTRY_POINT_GROUP)
        monkeypatch.setattr(EntryPoint, "load", lambda self: thing)
        monkeypatch.setattr("kvcache.choosing.entry_points", lambda group: [entry] if group == entry.group else [])
        selectors.cache_clear()

    yield pretend
    selectors.cache_clear()


def test_a_packages_selector_is_one_of_them(install: Any) -> None:
    install(type("Theirs", (Quest,), {"name": "theirs"}))
    made = make_selector({"selector": "theirs", "tokens": 64})
    assert made is not None and list(selectors())[-1] == "theirs"
    assert selector_words(made) == {"selector": "theirs", **made.args.model_dump()} and made.args.tokens == 64


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (dict, "is not a Selector"),
        (type("Taken", (Quest,), {"name": "tidal"}), "selector name 'tidal' is taken"),
        (type("Dense", (Quest,), {"name": "dense"}), "selector name 'dense' is taken"),
    ],
    ids=["no selector", "taken", "dense"],
)
def test_others_are_refused_by_name(install: Any, thing: Any, message: str) -> None:
    install(thing)
    with pytest.raises(ValueError, match=message):
        selectors()
