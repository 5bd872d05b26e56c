"""The desk where a request's `decode_attention` is checked."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from attention_plugins.decode.base import Place, Selector
from attention_plugins.decode.registry import BUILT_IN, selectors
from kvcache.method import PolicyError
from kvcache.pages import PageGeometry
from server.selectors import SelectorDesk

ALL = list(selectors())


def desk(enabled: list[str] = ALL, **rest: Any) -> SelectorDesk:
    return SelectorDesk(enabled=enabled, **{"calibrated": True, **rest})


def refusal(of: SelectorDesk, words: Any) -> PolicyError:
    with pytest.raises(PolicyError) as caught:
        of.check(words)
    return caught.value


def test_a_checked_selector_names_every_argument() -> None:
    assert desk().check({"selector": "dense"}) == {"selector": "dense"}
    words = desk().check({"selector": "recycled", "tokens": 512})
    assert words == {
        "selector": "recycled", "tokens": 512, "min_context": 12288, "kernel": 21, "window": 32,
        "pinned": 0.5, "stride": 50, "similarity": 0.0, "check_every": 5,
    }  # fmt: skip
    assert desk().check(words) == words


@pytest.mark.parametrize(
    ("words", "field", "told"),
    [
        (5, "decode_attention", "must be an object"),
        ("tidal", "decode_attention", "must be an object"),
        ({}, "decode_attention.selector", "is missing"),
        ({"selector": "tide"}, "decode_attention.selector", "unknown selector 'tide'.*dense, recycled, tidal"),
        ({"selector": ["tidal"]}, "decode_attention.selector", "unknown selector"),
        ({"selector": "dense", "tokens": 64}, "decode_attention.tokens", "takes no arguments"),
        ({"selector": "tidal", "stride": 5}, "decode_attention.stride", "tidal has no such argument.*tokens"),
        ({"selector": "tidal", "tokens": 31}, "decode_attention.tokens", "got 31.*>= 32 and <= 4096"),
        ({"selector": "tidal", "tokens": "1k"}, "decode_attention.tokens", "got '1k'"),
        ({"selector": "local", "share": 1.0}, "decode_attention.share", "> 0 and < 1|< 1"),
    ],
)
def test_mistakes_are_named_with_what_is_allowed(words: Any, field: str, told: str) -> None:
    error = refusal(desk(), words)
    assert error.field == field
    with pytest.raises(PolicyError, match=told):
        raise error


@pytest.mark.parametrize("name", ALL)
def test_a_selector_that_is_not_enabled_names_the_flag(name: str) -> None:
    error = refusal(desk([each for each in ALL if each != name]), {"selector": name})
    assert error.field == "decode_attention.selector"
    told = f"{name} is not enabled on this server; start it with --decode-selectors {name}."
    assert error.problem == told
    assert error.allowed == ", ".join(["dense", *(each for each in ALL if each != name)])


def test_only_what_requests_may_use_is_proposed() -> None:
    assert refusal(desk(["quest", "tidal"]), {"selector": "nope"}).allowed == "dense, tidal, quest"
    assert refusal(desk([]), {"selector": "nope"}).allowed == ", ".join(["dense", *ALL])


def test_a_selector_without_its_calibration_names_the_command() -> None:
    bare = desk(calibrated=False)
    for selector in selectors().values():
        if not selector.needs_calibration:
            assert bare.check({"selector": selector.name})
            continue
        error = refusal(bare, {"selector": selector.name})
        assert "--decode-calibration FILE" in error.problem and "`longreach calibrate`" in error.problem
        assert selector.name not in error.allowed


def test_selectors_that_want_all_heads_are_refused_on_several_gpus() -> None:
    wide = desk(tensor_parallel=2)
    for selector in selectors().values():
        if selector.with_tensor_parallel:
            assert wide.check({"selector": selector.name})
        else:
            assert "--tensor-parallel-size 1" in refusal(wide, {"selector": selector.name}).problem


def test_without_an_adapter_only_dense_is_taken() -> None:
    stock = SelectorDesk(unavailable="no adapter")
    assert stock.check({"selector": "dense"}) == stock.default == {"selector": "dense"}
    error = refusal(stock, {"selector": "tidal"})
    assert (error.field, error.allowed) == ("decode_attention.selector", "dense")
    assert "no adapter" in error.problem
    assert "unknown" in refusal(stock, {"selector": "nonsense"}).problem
    assert not any(each["enabled"] for each in stock.describe()["data"][1:])


def test_the_default_is_checked_like_a_request() -> None:
    assert desk(default={"selector": "quest", "tokens": 64}).default["min_context"] == 12288
    with pytest.raises(PolicyError, match="not enabled"):
        desk([], default={"selector": "quest"})


def test_the_description_says_what_requests_may_use_and_why_not_the_others() -> None:
    content = desk(["tidal"], calibrated=False, states=9).describe()
    assert json.loads(json.dumps(content)) == content
    assert (content["default"], content["states"], content["available"]) == ({"selector": "dense"}, 9, True)
    told = {each["name"]: (each["enabled"], each["unavailable_reason"]) for each in content["data"]}
    assert list(told) == ["dense", *ALL]
    assert told["dense"] == told["tidal"] == (True, None)
    assert not told["quest"][0] and "--decode-selectors quest" in str(told["quest"][1])
    assert not told["loki"][0] and "longreach calibrate" in str(told["loki"][1])
    for each in content["data"]:
        assert each["title"] and each["paper"]
        assert each["arguments"]["type"] == "object" and each["arguments"]["additionalProperties"] is False


def held(selector: type[Selector], num_pages: int) -> int:
    """Bytes of its reader beside a cache of so many pages."""
    geometry = PageGeometry((0, 8), 16, 2, 16, 32)
    calibration = {"loki.basis": torch.zeros(2, 2, 32, 8)}
    place = Place(
        geometry, num_pages, group=2, dtype=torch.bfloat16, device=torch.device("cpu"), rows=3, states=4, width=20,
        capacity=640, calibration=calibration,
    )  # fmt: skip
    return selector.reader.nbytes(place)


@pytest.mark.parametrize("selector", BUILT_IN, ids=lambda each: each.name)
def test_selectors_say_truly_whether_they_hold_something_for_each_page(selector: type[Selector]) -> None:
    holds = held(selector, 200) > held(selector, 100)
    assert selector.keeps_metadata is holds
    assert selector.describe().items() >= {"keeps_metadata": holds, "keeps_state": selector.keeps_state}.items()
