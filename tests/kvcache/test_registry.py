"""Policies by name: errors that help, words that come back, and policies of other packages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch

from kvcache.allocators.base import LayerAllocator
from kvcache.evidence import Evidence, LayerEvidence
from kvcache.policies.base import Policy, PolicyArgs
from kvcache.policies.snapkv import SnapKV
from kvcache.registry import (
    BUILT_IN,
    ENTRY_POINT_GROUP,
    HEADS,
    LAYERS,
    PARTS,
    PolicyError,
    make_policy,
    policies,
    policy_class,
    policy_words,
)
from tests.kvcache.synthetic import BUDGETED, PagedCache, compress, words

NAMES = "none, streamingllm, l2norm, keydiff, snapkv, pyramidkv, zigzagkv, adakv, criticalkv, tova, "
NAMES += "h2o, observedattention, d2o, expectedattention, rkv, lra, lfa, raas, namm, duoattention, random"
LAYER_NAMES, HEAD_NAMES = "uniform, pyramid, zigzag, zipvl, d2o", "equal, adakv"
COMMON = "budget, sinks, suffix, interval"
ARGUMENTS = f"{COMMON}, window, kernel, pooling, window_reduce, group_reduce, group_stage"
BUDGET = "a whole number of tokens or a share of the prompt such as '25%'"

MISTAKES: list[tuple[dict[str, Any], str, str, str]] = [
    ({"policy": "snapvk"}, "kv_cache.policy", "unknown policy 'snapvk'", NAMES),
    ({"policy": ["snapkv"]}, "kv_cache.policy", "unknown policy ['snapkv']", NAMES),
    ({"policy": None}, "kv_cache.policy", "unknown policy None", NAMES),
    ({"budget": 512}, "kv_cache.policy", "is missing", NAMES),
    ({}, "kv_cache.policy", "is missing", NAMES),
    ({"policy": "none", "budget": 512}, "kv_cache.budget", "takes no arguments", "no further fields"),
    ({"policy": "snapkv", "windw": 8}, "kv_cache.windw", "snapkv has no such argument", ARGUMENTS),
    ({"policy": "streamingllm", "window": 8}, "kv_cache.window", "streamingllm has no such argument", COMMON),
    (
        {"policy": "snapkv", "window": 0},
        "kv_cache.window",
        "greater than or equal to 1; got 0",
        "integer >= 1 and <= 1024",
    ),
    ({"policy": "snapkv", "window": 1025}, "kv_cache.window", "less than or equal to 1024", "integer >= 1 and <= 1024"),
    ({"policy": "snapkv", "window": "8"}, "kv_cache.window", "valid integer; got '8'", "integer >= 1 and <= 1024"),
    ({"policy": "snapkv", "window": 8.0}, "kv_cache.window", "valid integer; got 8.0", "integer >= 1 and <= 1024"),
    ({"policy": "snapkv", "window": True}, "kv_cache.window", "valid integer; got True", "integer >= 1 and <= 1024"),
    ({"policy": "snapkv", "window": None}, "kv_cache.window", "valid integer; got None", "integer >= 1 and <= 1024"),
    ({"policy": "snapkv", "kernel": 4}, "kv_cache.kernel", "must be odd; got 4", "integer >= 1 and <= 127"),
    ({"policy": "snapkv", "pooling": "mean"}, "kv_cache.pooling", "got 'mean'", "'avg', 'max', 'none'"),
    ({"policy": "snapkv", "budget": 0}, "kv_cache.budget", "got 0", BUDGET),
    ({"policy": "snapkv", "budget": "150%"}, "kv_cache.budget", "got '150%'", BUDGET),
    ({"policy": "snapkv", "budget": 1.5}, "kv_cache.budget", "got 1.5", BUDGET),
    ({"policy": "pyramidkv", "beta": 0}, "kv_cache.beta", "got 0", "integer >= 1 and <= 1000"),
    ({"policy": "random", "seed": -1}, "kv_cache.seed", "got -1", "integer >= 0 and <= 2147483647"),
    ({"policy": "snapkv", "layers": "zigzagkv"}, "kv_cache.layers", "no such allocator: 'zigzagkv'", LAYER_NAMES),
    ({"policy": "snapkv", "layers": "adakv"}, "kv_cache.layers", "no such allocator: 'adakv'", LAYER_NAMES),
    ({"policy": "snapkv", "layers": None}, "kv_cache.layers", "no such allocator: None", LAYER_NAMES),
    ({"policy": "snapkv", "layers": ["zigzag"]}, "kv_cache.layers", "no such allocator: ['zigzag']", LAYER_NAMES),
    ({"policy": "zigzagkv", "heads": "zigzag"}, "kv_cache.heads", "no such allocator: 'zigzag'", HEAD_NAMES),
    ({"policy": "adakv", "heads": 2}, "kv_cache.heads", "no such allocator: 2", HEAD_NAMES),
    ({"policy": "snpkv", "heads": "x"}, "kv_cache.policy", "unknown policy 'snpkv'", NAMES),
    ({"policy": "none", "layers": "uniform"}, "kv_cache.layers", "takes no arguments", "no further fields"),
    ({"policy": "none", "heads": "adakv"}, "kv_cache.heads", "takes no arguments", "no further fields"),
    ({"policy": "none", "report": "positions"}, "kv_cache.report", "takes no arguments", "no further fields"),
    ({"policy": "snapkv", "report": "heads"}, "kv_cache.report", "there is no such report: 'heads'", "'positions'"),
    ({"policy": "snapkv", "report": None}, "kv_cache.report", "there is no such report: None", "'positions'"),
    ({"policy": "snapkv", "mass": 0.9}, "kv_cache.mass", "snapkv has no such argument", ARGUMENTS),
    ({"policy": "snapkv", "heads": "adakv", "mass": 0.9}, "kv_cache.mass", "no such argument", f"floor, {ARGUMENTS}"),
    ({"policy": "l2norm", "window": 8}, "kv_cache.window", "no such argument", f"{COMMON}, recent"),
    ({"policy": "l2norm", "layers": "pyramid", "window": 8}, "kv_cache.window", "no such argument",
     f"beta, {COMMON}, recent"),
    ({"policy": "tova", "layers": "zipvl", "bound": 0.5}, "kv_cache.bound", "no such argument",
     f"window, tau, {COMMON}"),
    ({"policy": "adakv", "floor": 1.01}, "kv_cache.floor", "got 1.01", "number >= 0 and <= 1"),
    ({"policy": "adakv", "floor": math.nan}, "kv_cache.floor", "got nan", "number >= 0 and <= 1"),
    ({"policy": "snapkv", "layers": "zigzag", "bound": -0.1}, "kv_cache.bound", "got -0.1", "number >= 0 and <= 1"),
    ({"policy": "snapkv", "layers": "pyramid", "beta": 0}, "kv_cache.beta", "got 0", "integer >= 1 and <= 1000"),
    ({"policy": "criticalkv", "epsilon": -1}, "kv_cache.epsilon", "got -1", "number >= 0 and <= 1"),
    ({"policy": "h2o", "recent_share": 1.5}, "kv_cache.recent_share", "got 1.5", "number >= 0 and <= 1"),
    ({"policy": "h2o", "merge": "none"}, "kv_cache.merge", "h2o has no such argument",
     f"{COMMON}, recent_share, watch"),
    ({"policy": "d2o", "merge": "mean"}, "kv_cache.merge", "got 'mean'", "'paper', 'scatter', 'none'"),
    ({"policy": "d2o", "threshold": math.inf}, "kv_cache.threshold", "got inf", "number >= -2 and <= 2"),
    ({"policy": "snapkv", "layers": "d2o", "whole_last": -1}, "kv_cache.whole_last", "got -1",
     "integer >= 0 and <= 1024"),
    ({"policy": "criticalkv", "first_stage": "half"}, "kv_cache.first_stage", "got 'half'", "number >= 0 and <= 1"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "field", "problem", "allowed"), MISTAKES, ids=lambda value: str(value)[:40])
def test_errors_name_the_field_and_what_is_allowed(
    words: dict[str, Any], field: str, problem: str, allowed: str
) -> None:
    with pytest.raises(PolicyError) as caught:
        make_policy(words)
    error = caught.value
    if "no such argument" in problem:
        allowed += ", layers, heads, report"
    assert error.field == field and problem in error.problem and error.allowed == allowed
    message = str(error)
    assert message.startswith(f"{field}: ") and message.endswith(f" Allowed: {allowed}.")
    assert "pydantic" not in message and message.count("got ") <= 2 and "Value error" not in message


@pytest.mark.parametrize("words", [None, "snapkv", ["snapkv"], 5])
def test_words_that_are_no_object_are_errors(words: Any) -> None:
    with pytest.raises(PolicyError, match="kv_cache: must be an object"):
        make_policy(words)


@pytest.mark.parametrize("policy", BUDGETED)
@pytest.mark.parametrize("budget", [None, 300, "12.5%", "0.00001%", "29%"])
def test_words_come_back(policy: str, budget: int | str | None) -> None:
    """Scheduler and worker exchange words, so what one writes the other has to read the same."""
    asked = {"policy": policy, "sinks": 7} | ({"budget": budget} if budget else {})
    built = make_policy(asked)
    assert type(built) is policies()[policy]
    words = json.loads(json.dumps(policy_words(built)))
    again = make_policy(words)
    assert again is not None and again.args == built.args
    assert policy_words(again) == words
    assert words.items() >= (asked | {"budget": budget or 1024}).items()
    assert set(words) == {"policy", *built.Args.model_fields}


LATER: dict[str, Any] = {"suffix": 3, "interval": 0}


@pytest.mark.parametrize(
    "words",
    [
        {"policy": "pyramidkv", "budget": 99, "sinks": 0, **LATER, "window": 5, "kernel": 3, "pooling": "avg",
         "window_reduce": "mean", "group_reduce": "sum", "group_stage": "logits", "beta": 7},
        {"policy": "zigzagkv", "budget": 99, "sinks": 0, **LATER, "window": 5, "kernel": 3, "pooling": "avg",
         "window_reduce": "mean", "group_reduce": "sum", "group_stage": "logits",
         "mass": 0.75, "bound": 0.125, "heads": "adakv", "floor": 0.3},
        {"policy": "criticalkv", "budget": "7%", "sinks": 0, **LATER, "window": 5, "kernel": 3, "pooling": "none",
         "window_reduce": "mean", "group_reduce": "sum", "group_stage": "logits", "first_stage": 0.1, "epsilon": 1e-7},
        {"policy": "tova", "budget": 99, "sinks": 0, **LATER, "interval": 40, "window": 2, "layers": "zipvl",
         "tau": 0.1 + 0.2},
        {"policy": "keydiff", "budget": 99, "sinks": 0, **LATER, "recent": 2, "layers": "pyramid", "beta": 3,
         "heads": "adakv", "floor": 0.0},
        {"policy": "d2o", "budget": 99, "sinks": 0, **LATER, "recent_share": 0.3, "merge": "scatter", "threshold": -0.1,
         "whole_first": 2, "whole_last": 1},
    ],
    ids=lambda words: words["policy"],
)  # fmt: skip
def test_every_argument_comes_back(words: dict[str, Any]) -> None:
    assert policy_words(make_policy(words)) == words


COMBINATIONS = pytest.mark.parametrize(
    ("policy", "layers", "heads"), list(product(BUDGETED, LAYERS, HEADS)), ids=lambda value: str(value)
)


@COMBINATIONS
def test_combinations_come_back(policy: str, layers: str, heads: str) -> None:
    """Allocators are named where they aren't the policy's own; arguments are those of the policy and of its parts."""
    usual = policies()[policy]
    built = make_policy({"policy": policy, "layers": layers, "heads": heads, "sinks": 7})
    assert isinstance(built, usual) and built.name == policy
    assert built.describe()["description"] == usual.describe()["description"]
    assert type(built.layer_allocator) is built.layers is LAYERS[layers]
    assert type(built.head_allocator) is built.heads is HEADS[heads]
    words = json.loads(json.dumps(policy_words(built)))
    assert words.get("layers", usual.layers.name) == layers and ("layers" in words) == (usual.layers.name != layers)
    assert words.get("heads", usual.heads.name) == heads and ("heads" in words) == (usual.heads.name != heads)
    again = make_policy(words)
    assert type(again) is type(built) and again is not None and again.args == built.args
    assert policy_words(again) == words and words["sinks"] == 7
    parts = {*LAYERS[layers].Args.model_fields, *HEADS[heads].Args.model_fields}
    assert parts <= set(built.Args.model_fields) <= {*usual.Args.model_fields, *parts}
    assert (type(built) is usual) == ((layers, heads) == (usual.layers.name, usual.heads.name))


@COMBINATIONS
def test_arguments_that_a_policy_has_itself_keep_its_defaults(policy: str, layers: str, heads: str) -> None:
    """TOVA's window is one query, whichever allocator looks at it too."""
    own, combined = policies()[policy], policy_class({"policy": policy, "layers": layers, "heads": heads})
    assert PolicyArgs.model_fields.keys() <= combined.Args.model_fields.keys()
    for name in own.Args.model_fields.keys() & combined.Args.model_fields.keys():
        assert repr(combined.Args.model_fields[name]) == repr(own.Args.model_fields[name])


@COMBINATIONS
def test_needs_of_combinations(policy: str, layers: str, heads: str) -> None:
    """What an allocator looks at is kept while the prompt runs, and must fit into the smallest budget."""
    if policy == "raas":
        return  # compacts answers alone, and none whose heads differ
    small = {"window": 50} if layers in ("zigzag", "zipvl") else {}
    built = make_policy({"policy": policy, "layers": layers, "heads": heads, "budget": 1, "interval": 0, **small})
    usual = make_policy({"policy": policy})
    assert built is not None and usual is not None
    assert (usual.query_window > 0) == (Evidence.WINDOW_QUERIES in usual.needs)
    sums = layers == "d2o" or policy in ("h2o", "observedattention", "d2o")
    assert (Evidence.COLUMN_SUMS in built.needs) == sums
    others = {"expectedattention": "query_moments", "namm": "spectrogram"}
    observers = built.observers(3, 200)
    kinds = ["window_queries"] * (built.query_window > 0) + ["column_sums"] * sums
    assert [observer.name for observer in observers] == kinds + [
        name for taker, name in others.items() if taker == policy
    ]
    assert built.first_query(200) == min([199, *(observer.first for observer in observers)])
    assert built.first_query(200) >= 150 or sums or policy in others
    if not small:
        assert built.query_window == usual.query_window
        assert built.minimum_budget(16) == usual.minimum_budget(16)
        return
    assert built.evidence is Evidence.costliest(usual.evidence, Evidence.WINDOW_QUERIES)
    assert built.needs == usual.needs | {Evidence.WINDOW_QUERIES} and built.query_window == 50
    assert built.minimum_budget(16) == 50 + 4 + 32
    assert built.recent == (50 if "window" in policies()[policy].Args.model_fields else usual.recent)
    assert built.plan(86, 16) is None and built.plan(87, 16) is not None


OWN_PARTS = [("zigzagkv", "layers", "uniform", {"mass": 0.5}), ("zigzagkv", "layers", "zipvl", {"bound": 0.5}),
             ("d2o", "layers", "uniform", {"whole_first": 2}), ("pyramidkv", "layers", "uniform", {"beta": 7}),
             ("adakv", "heads", "equal", {"floor": 0.5})]  # fmt: skip


@pytest.mark.parametrize(("policy", "field", "part", "foreign"), OWN_PARTS)
def test_arguments_of_an_own_part_that_was_not_chosen_are_refused(
    policy: str, field: str, part: str, foreign: dict[str, Any]
) -> None:
    with pytest.raises(PolicyError, match="has no such argument"):
        make_policy({"policy": policy, field: part, **foreign})


@pytest.mark.parametrize(("part", "field"), [("zigzag", "mass"), ("zipvl", "tau")])
def test_excluded_bounds_are_named(part: str, field: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make_policy({"policy": "snapkv", "layers": part, field: 0})
    assert caught.value.allowed == "number > 0 and <= 1"


@pytest.mark.parametrize("part", [part for known in PARTS.values() for part in known.values()], ids=lambda p: p.name)
def test_description_of_allocators_is_json(part: Any) -> None:
    text = json.loads(json.dumps(part.describe()))
    assert all(text[key] for key in ("title", "paper", "evidence", "description"))
    assert (text["evidence"] == "last-w queries") == (part.name in ("zigzag", "zipvl"))
    assert all(
        argument["description"] and "default" in argument for argument in text["arguments"]["properties"].values()
    )
    assert text["arguments"]["additionalProperties"] is False
    assert [known[part.name] is part for known in PARTS.values() if part.name in known] == [True]


def test_none_is_no_policy() -> None:
    assert make_policy({"policy": "none"}) is None
    assert policy_words(None) == {"policy": "none"}
    assert "none" not in policies()


@pytest.mark.parametrize("policy", policies().values(), ids=lambda policy: policy.name)
def test_description_is_json_with_defaults_and_bounds(policy: type[Policy]) -> None:
    text = json.loads(json.dumps(policy.describe()))
    assert text["name"] == policy.name and policies()[text["name"]] is policy
    assert all(text[key] for key in ("title", "paper", "evidence", "description"))
    arguments = text["arguments"]["properties"]
    assert set(arguments) == set(policy.Args.model_fields)
    if policy.name in BUDGETED:
        assert arguments["budget"]["default"] == 1024
        assert [form["type"] for form in arguments["budget"]["anyOf"]] == ["integer", "string"]
    assert all(argument["description"] and "default" in argument for argument in arguments.values())
    assert text["arguments"]["additionalProperties"] is False
    assert (text["layers"], text["heads"]) == (policy.layers.name, policy.heads.name)
    assert text["layer_lengths_differ"] == (policy.layers.name != "uniform" or policy.heads.decides_layers)


def test_descriptions_of_builtin_policies_differ() -> None:
    assert list(policies()) == [policy.name for policy in BUILT_IN]
    for key in ("title", "description"):
        assert len({policy.describe()[key] for policy in BUILT_IN}) == len(BUILT_IN)
    assert {policy.name: (policy.layers.name, policy.heads.name) for policy in BUILT_IN} == {
        **{policy.name: ("uniform", "equal") for policy in BUILT_IN},
        "pyramidkv": ("pyramid", "equal"),
        "zigzagkv": ("zigzag", "equal"),
        "d2o": ("d2o", "equal"),
        "adakv": ("uniform", "adakv"),
        "duoattention": ("uniform", "gates"),
    }


class FirstHalf(Policy):
    """Keep what comes first."""

    name = "firsthalf"
    title = "First tokens"
    paper = "none"

    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        heads, prompt_len, _ = evidence.keys.shape
        return -torch.arange(prompt_len, dtype=torch.float32).expand(heads, prompt_len)


class Impostor(FirstHalf):
    name = "snapkv"


class Nothing(FirstHalf):
    name = "none"


@dataclass(frozen=True)
class Entry:
    """As importlib.metadata's EntryPoint."""

    name: str
    target: Any

    def load(self) -> Any:
        return self.target


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Pretend that packages with these entry points are installed."""

    def pretend(*targets: Any) -> None:
        groups = {ENTRY_POINT_GROUP: [Entry(f"entry{i}", target) for i, target in enumerate(targets)]}
        monkeypatch.setattr("kvcache.choosing.entry_points", lambda group: groups[group])
        policies.cache_clear()

    yield pretend
    policies.cache_clear()


def test_policy_of_another_package_works_whole(install: Install) -> None:
    install(FirstHalf, SnapKV)
    assert list(policies())[-1] == "firsthalf" and policies()["snapkv"] is SnapKV
    with pytest.raises(PolicyError, match=r"Allowed: none, .*random, firsthalf"):
        make_policy({"policy": "x"})
    run = compress(PagedCache(150), {"policy": "firsthalf", "budget": 70, "sinks": 0})
    assert all(positions.tolist() == list(range(64)) for _, _, positions in run.heads())


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("layers", LAYERS)
def test_policy_of_another_package_works_with_every_allocator(install: Install, layers: str, heads: str) -> None:
    """It overrides `scores` alone. With sinks, and a window that it knows nothing of."""
    install(FirstHalf)
    cache = PagedCache(150, num_heads=4, num_kv_heads=2, uneven=True)
    order = words("firsthalf", 70, layers=layers, heads=heads)
    assert ("window" in order) == (layers in ("zigzag", "zipvl"))
    run = compress(cache, order)
    counts = run.tables.counts[run.slot]
    assert int(counts.sum()) == run.plan.kept_pages * 4 * 2
    for layer, head, positions in run.heads():
        assert positions.tolist() == list(range(int(counts[layer, head]) * 16))


class Halves(LayerAllocator):
    """Nothing for upper layers beyond what they must have."""

    name = "halves"
    title = "Lower layers"
    paper = "none"

    def shares(
        self, num_layers: int, budget: int, prompt_len: int, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        lower = [2.0 * budget] * (num_layers // 2)
        return torch.tensor(lower + [0.0] * (num_layers - len(lower)), dtype=torch.float64)


class LowerHalf(FirstHalf):
    name = "lowerhalf"
    layers = Halves


def test_policy_of_another_package_may_bring_its_allocator(install: Install) -> None:
    install(LowerHalf)
    words = policy_words(make_policy({"policy": "lowerhalf", "budget": 70}))
    assert words == {"policy": "lowerhalf", "budget": 70, "sinks": 4, "suffix": 0, "interval": 0}


@pytest.mark.parametrize("target", [Impostor, Nothing])
def test_policy_name_in_use_is_refused(install: Install, target: type[Policy]) -> None:
    install(FirstHalf, target)
    with pytest.raises(ValueError, match=f"entry point entry1: the policy name '{target.name}' is taken"):
        policies()


@pytest.mark.parametrize(
    "target",
    [dict, FirstHalf(FirstHalf.Args.model_validate({})), "firsthalf", None],
    ids=["class", "instance", "text", "none"],
)
def test_entry_that_is_no_policy_is_refused(install: Install, target: Any) -> None:
    install(target)
    with pytest.raises(ValueError, match=rf"entry point entry0 of {ENTRY_POINT_GROUP} is not a Policy"):
        policies()
