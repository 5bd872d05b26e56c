"""Words become patterns, and what is wrong with them is said."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from attention_plugins.prefill import registry
from attention_plugins.prefill.base import Pattern
from attention_plugins.prefill.registry import BUILT_IN, make_pattern, pattern_words, patterns
from attention_plugins.prefill.streaming import Streaming
from kvcache.method import PolicyError
from tests.attention_plugins.prefill.prompts import SPARSE


@pytest.mark.parametrize("name", [pattern.name for pattern in BUILT_IN])
def test_words_and_back(name: str) -> None:
    for words in ({"pattern": name}, {"pattern": name, **SPARSE[name]}):
        pattern = make_pattern(words)
        assert pattern is not None and pattern.name == name
        spelled = pattern_words(pattern)
        assert spelled["pattern"] == name and pattern_words(make_pattern(spelled)) == spelled
    described = patterns()[name].describe()
    assert described["formula"] and described["name"] == name
    assert described["chunk_exact"] == patterns()[name].chunk_exact
    for field in described["arguments"]["properties"].values():
        assert field["description"] and ("default" in field or name == "delta")


def test_dense() -> None:
    assert make_pattern({"pattern": "dense"}) is None
    assert pattern_words(None) == {"pattern": "dense"}


@pytest.mark.parametrize(
    ("words", "field", "allowed"),
    [
        ("streaming", "prefill_attention", "pattern"),
        ({}, "prefill_attention.pattern", "xattention"),
        ({"pattern": "nope"}, "prefill_attention.pattern", "dense, xattention"),
        ({"pattern": 3}, "prefill_attention.pattern", "xattention"),
        ({"pattern": "dense", "window": 1}, "prefill_attention.window", "no further"),
        ({"pattern": "streaming", "window": 0}, "prefill_attention.window", "integer >= 1"),
        ({"pattern": "streaming", "window": "5"}, "prefill_attention.window", "integer"),
        ({"pattern": "streaming", "size": 1}, "prefill_attention.size", "sinks"),
        ({"pattern": "xattention", "stride": 5}, "prefill_attention.stride", "4, 8, 16"),
        ({"pattern": "xattention", "threshold": 1.5}, "prefill_attention.threshold", "<= 1"),
        ({"pattern": "delta", "gamma": 0}, "prefill_attention.gamma", ">= 1"),
        ({"pattern": "delta", "window": 9}, "prefill_attention.window", "base, gamma"),
        ({"pattern": "delta", "base": 3}, "prefill_attention.base", "object"),
        ({"pattern": "delta", "base": {}}, "prefill_attention.base.pattern", "streaming"),
        ({"pattern": "delta", "base": {"pattern": "hip", "window": 1}}, "prefill_attention.base.window", ">= 256"),
        ({"pattern": "delta", "base": {"pattern": "delta"}}, "prefill_attention.base.pattern", "xattention"),
        ({"pattern": "delta", "base": {"pattern": "dense"}}, "prefill_attention.base.pattern", "xattention"),
    ],
)
def test_says_what_is_wrong(words: Any, field: str, allowed: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make_pattern(words)
    assert caught.value.field == field and allowed in caught.value.allowed


def test_delta_is_what_its_base_is() -> None:
    for name in ("streaming", "flexprefill", "power", "minference"):
        pattern = make_pattern({"pattern": "delta", "base": {"pattern": name}})
        base = make_pattern({"pattern": name})
        assert pattern is not None and base is not None
        for attribute in ("needs_training", "needs_calibration", "per_kv_head", "chunk_exact"):
            assert getattr(pattern, attribute) == getattr(base, attribute)
    assert {pattern.name for pattern in BUILT_IN if pattern.needs_training} == {"power", "strided", "bigbird"}
    assert {pattern.name for pattern in BUILT_IN if pattern.needs_calibration} == {"minference"}


class Mine(Streaming):
    """A package's own. Formula: as its parent's."""

    name = "mine"


@pytest.mark.parametrize(
    ("value", "name", "message"),
    [("Mine", "mine", ""), ("int_", "x", "not a Pattern"), ("Taken", "xattention", "taken"), ("Dense", "d", "taken")],
)
def test_packages(monkeypatch: pytest.MonkeyPatch, value: str, name: str, message: str) -> None:
    taken, dense = type("Taken", (Streaming,), {"name": "xattention"}), type("Dense", (Streaming,), {"name": "dense"})
    loaded: dict[str, Any] = {"Mine": Mine, "int_": int, "Taken": taken, "Dense": dense}
    entry = EntryPoint(name=name, value="package:thing", group=registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: loaded[value])
    monkeypatch.setattr("kvcache.choosing.entry_points", lambda group: [entry])
    patterns.cache_clear()
    try:
        if message:
            with pytest.raises(ValueError, match=message):
                patterns()
        else:
            mine = make_pattern({"pattern": "mine", "window": 5})
            assert isinstance(mine, Pattern) and pattern_words(mine)["window"] == 5
    finally:
        patterns.cache_clear()
