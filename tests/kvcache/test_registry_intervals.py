"""Intervals and suffixes in a request's words: which are taken, and what is said of the others."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from pydantic import Field

from kvcache.evidence import LayerEvidence
from kvcache.policies.base import Policy, PolicyArgs
from kvcache.registry import HEADS, LAYERS, PolicyError, make_policy, policies, policy_class, policy_words
from server.policies import HouseRules, PolicyDesk

REPEATING = ["streamingllm", "l2norm", "keydiff", "snapkv", "pyramidkv", "zigzagkv", "criticalkv", "tova", "h2o", "rkv",
             "lra", "lfa", "raas", "random"]  # fmt: skip
HEADS_DIFFER, OF_PROMPTS = "its heads differ in length", "what it needs is of prompts only"
REFUSED: list[tuple[dict[str, Any], str, str, str]] = [
    ({"policy": "adakv", "interval": 64}, "interval", f"adakv can't compact answers: {HEADS_DIFFER}", "0"),
    ({"policy": "snapkv", "heads": "adakv", "interval": 64}, "interval",
     f"snapkv can't compact answers: {HEADS_DIFFER}", "0"),
    ({"policy": "h2o", "heads": "adakv", "interval": 1}, "interval", f"h2o can't compact answers: {HEADS_DIFFER}", "0"),
    ({"policy": "rkv", "heads": "adakv", "interval": 128}, "interval",
     f"rkv can't compact answers: {HEADS_DIFFER}", "0"),
    ({"policy": "observedattention", "interval": 64}, "interval",
     f"observedattention can't compact answers: {OF_PROMPTS}", "0"),
    ({"policy": "expectedattention", "interval": 1}, "interval",
     f"expectedattention can't compact answers: {OF_PROMPTS}", "0"),
    ({"policy": "d2o", "interval": 64}, "interval", f"d2o can't compact answers: {OF_PROMPTS}", "0"),
    ({"policy": "namm", "interval": 64}, "interval", f"namm can't compact answers: {OF_PROMPTS}", "0"),
    ({"policy": "snapkv", "layers": "d2o", "interval": 64}, "interval",
     f"snapkv can't compact answers: {OF_PROMPTS}", "0"),
    ({"policy": "lra", "layers": "d2o", "interval": 128}, "interval", f"lra can't compact answers: {OF_PROMPTS}", "0"),
    ({"policy": "raas", "heads": "adakv"}, "heads", f"raas can't compact answers: {HEADS_DIFFER}", "equal"),
    ({"policy": "raas", "layers": "d2o", "interval": 64}, "layers", f"raas can't compact answers: {OF_PROMPTS}",
     "uniform, pyramid, zigzag, zipvl"),
    ({"policy": "snapkv", "interval": 31}, "interval", "31 tokens are fewer than snapkv watches of each", "0 or >= 32"),
    ({"policy": "lra", "interval": 7}, "interval", "7 tokens are fewer than lra watches", "0 or >= 8"),
    ({"policy": "lfa", "interval": 128, "window": 129}, "interval", "128 tokens are fewer than lfa", "0 or >= 129"),
    ({"policy": "rkv", "interval": 8, "window": 9}, "interval", "8 tokens are fewer than rkv", "0 or >= 9"),
    ({"policy": "h2o", "interval": 15, "watch": 16}, "interval", "15 tokens are fewer than h2o", "0 or >= 16"),
    ({"policy": "tova", "interval": 4, "window": 5}, "interval", "4 tokens are fewer than tova", "0 or >= 5"),
    ({"policy": "keydiff", "layers": "zigzag", "interval": 31}, "interval", "31 tokens are fewer than keydiff",
     "0 or >= 32"),
    ({"policy": "raas", "interval": 7}, "interval", "7 tokens are fewer than raas watches", ">= 8"),
    ({"policy": "raas", "interval": 0}, "interval", "greater than or equal to 1; got 0", "integer >= 1"),
    ({"policy": "raas", "interval": 128, "window": 0}, "window", "got 0", "integer >= 1 and <= 256"),
    ({"policy": "raas", "alpha": 1.0}, "alpha", "less than 1; got 1.0", "number >= 0 and < 1"),
    ({"policy": "raas", "page": 0}, "page", "got 0", "integer >= 1 and <= 256"),
    ({"policy": "lra", "top": 0}, "top", "got 0", "integer >= 1 and <= 4096"),
    ({"policy": "lfa", "window": 257}, "window", "got 257", "integer >= 1 and <= 256"),
    ({"policy": "h2o", "watch": 257}, "watch", "got 257", "integer >= 1 and <= 256"),
    ({"policy": "snapkv", "interval": -1}, "interval", "got -1", "integer >= 0"),
    ({"policy": "snapkv", "interval": "64"}, "interval", "valid integer; got '64'", "integer >= 0"),
    ({"policy": "snapkv", "interval": 64.0}, "interval", "valid integer; got 64.0", "integer >= 0"),
    ({"policy": "snapkv", "interval": True}, "interval", "valid integer; got True", "integer >= 0"),
    ({"policy": "snapkv", "interval": None}, "interval", "valid integer; got None", "integer >= 0"),
    ({"policy": "snapkv", "suffix": -1}, "suffix", "got -1", "integer >= 0"),
    ({"policy": "snapkv", "suffix": "10%"}, "suffix", "valid integer; got '10%'", "integer >= 0"),
    ({"policy": "none", "interval": 64}, "interval", "takes no arguments", "no further fields"),
    ({"policy": "none", "suffix": 64}, "suffix", "takes no arguments", "no further fields"),
    ({"policy": "duoattention", "interval": 64}, "interval", "duoattention has no such argument",
     "gates, sparsity, sinks, suffix, recent, report"),
]  # fmt: skip


def test_an_interval_by_default_stands_against_no_allocator() -> None:
    for words in ({"policy": "rkv", "heads": "adakv"}, {"policy": "lra", "layers": "d2o"}):
        made = make_policy(words)
        assert made is not None and made.args.interval == 0


def refused(words: Any, field: str, problem: str, allowed: str, asked: Any) -> None:
    with pytest.raises(PolicyError) as caught:
        asked(words)
    error = caught.value
    assert error.field == f"kv_cache.{field}" and problem in error.problem and error.allowed == allowed
    assert str(error) == f"kv_cache.{field}: {error.problem} Allowed: {allowed}."


@pytest.mark.parametrize(("words", "field", "problem", "allowed"), REFUSED, ids=lambda value: str(value)[:60])
def test_refusals_name_the_field_and_what_is_allowed(
    words: dict[str, Any], field: str, problem: str, allowed: str
) -> None:
    """By the registry and by a server's desk alike, the server's own policy too."""
    refused(words, field, problem, allowed, make_policy)
    refused(words, field, problem, allowed, PolicyDesk({"policy": "none"}, 16).check)
    refused(words, field, problem, allowed, lambda own: PolicyDesk(own, 16))


@pytest.mark.parametrize(("words", "field", "problem", "allowed"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_is_said_to_be_allowed_is(words: dict[str, Any], field: str, problem: str, allowed: str) -> None:
    numbers = [int(part.split(">= ")[1].split(" ")[0]) for part in [allowed] if ">= " in part]
    values: list[Any] = numbers + ([0] if allowed.startswith("0") else [])
    values += allowed.split(", ") if field in PARTS_BY_FIELD else []
    if "argument" in problem:  # there is no value that would help
        return
    assert values
    for value in values:
        made = {**words, field: value}
        if words == {"policy": "raas", "interval": 0}:  # 1 is taken with a window of 1
            made["window"] = 1
        assert make_policy(made) is not None


PARTS_BY_FIELD = {"layers": LAYERS, "heads": HEADS}


def test_which_policies_repeat() -> None:
    assert [name for name, policy in policies().items() if policy.repeats()] == REPEATING
    for name, policy in policies().items():
        assert policy.describe()["repeats"] == (name in REPEATING)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", REPEATING)
def test_which_combinations_repeat(name: str, layers: str, heads: str) -> None:
    """Heads of equal length, and evidence that can be had of an answer; H2O goes on from its own sums."""
    repeats = heads == "equal" and (layers != "d2o" or name == "h2o")
    words = {"policy": name, "layers": layers, "heads": heads, "interval": 300}
    assert policy_class(words).repeats() == repeats
    if repeats:
        policy = make_policy(words)
        assert policy is not None and policy_words(policy)["interval"] == 300
    else:
        with pytest.raises(PolicyError, match="can't compact answers"):
            make_policy(words)


@pytest.mark.parametrize(
    ("words", "least"),
    [
        ({"policy": "streamingllm"}, 1), ({"policy": "l2norm", "recent": 40}, 1), ({"policy": "random"}, 1),
        ({"policy": "snapkv", "window": 5}, 5), ({"policy": "tova"}, 1), ({"policy": "rkv"}, 8),
        ({"policy": "h2o"}, 8), ({"policy": "h2o", "watch": 3}, 3), ({"policy": "lfa", "window": 64}, 64),
        ({"policy": "raas"}, 8), ({"policy": "l2norm", "layers": "zipvl", "window": 77}, 77),
    ],
)  # fmt: skip
def test_the_least_interval_is_taken_and_one_less_is_not(words: dict[str, Any], least: int) -> None:
    policy = make_policy({**words, "interval": least})
    assert policy is not None and policy.least_interval == least
    if least > 1:
        with pytest.raises(PolicyError, match=f">= {least}"):
            make_policy({**words, "interval": least - 1})


@pytest.mark.parametrize(
    ("begin", "end", "first"), [(0, 1000, 992), (992, 1000, 992), (990, 1000, 992), (995, 1000, 995), (999, 1000, 999)]
)
@pytest.mark.parametrize("name", ["lra", "lfa", "raas", "rkv", "h2o"])
def test_an_interval_is_watched_from_its_begin_at_most(name: str, begin: int, end: int, first: int) -> None:
    """The first interval behind a prompt with a tail may be shorter than the window."""
    policy = make_policy({"policy": name})
    assert policy is not None
    (window,) = policy.answer_observers(3, begin, end)
    assert (window.name, window.first, window.end, window.missing) == ("window_queries", first, end, 3 * (end - first))


def test_intervals_that_are_usual() -> None:
    """Policies that were made for answers compact them unless told not to; the others only when told so."""
    usual = {name: policies()[name].Args.model_fields["interval"].default for name in policies() if name in REPEATING}
    assert {name for name, interval in usual.items() if interval} == {"rkv", "lra", "lfa", "raas"}
    assert {usual[name] for name in ("rkv", "lra", "lfa", "raas")} == {128}


@pytest.mark.parametrize("name", REPEATING)
def test_the_desk_spells_out_intervals_and_suffixes(name: str) -> None:
    desk = PolicyDesk({"policy": name, "interval": 64, "suffix": 9}, 16, rules=HouseRules(always_keep=6))
    assert desk.default.items() >= {"policy": name, "interval": 64, "suffix": 9, "sinks": 6}.items()
    assert desk.check(desk.default) == desk.default
    described = {each["name"]: each for each in desk.describe()["data"]}
    assert described[name]["repeats"] is True
    assert {"interval", "suffix"} <= described[name]["arguments"]["properties"].keys()


class Eager(Policy):
    """Another package's, which has no other way than to compact answers, and none that it could be told."""

    name = "eager"
    title = "Eager"
    paper = "none"

    class Args(PolicyArgs):
        interval: int = Field(16, ge=16)

    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        return evidence.positions.float()


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    entry = EntryPoint("eager", f"{__name__}:Eager", "longreach.policies")
    monkeypatch.setattr(EntryPoint, "load", lambda self: Eager)
    monkeypatch.setattr("kvcache.choosing.entry_points", lambda group: [entry])
    policies.cache_clear()
    yield
    policies.cache_clear()


@pytest.mark.usefixtures("eager")
def test_another_packages_policy_that_always_repeats() -> None:
    assert make_policy({"policy": "eager"}) is not None
    refused({"policy": "eager", "heads": "adakv"}, "heads", HEADS_DIFFER, "equal", make_policy)
    refused({"policy": "eager", "interval": 0}, "interval", "got 0", "integer >= 16", make_policy)
    made = {"policy": "eager", "layers": "zigzag", "window": 40}
    refused(made, "interval", "16 tokens are fewer than eager", ">= 40", make_policy)
