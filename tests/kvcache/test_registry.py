"""Policies by name: errors that help, words that come back, and policies of other packages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import kvcache.registry
from kvcache.evidence import LayerEvidence
from kvcache.policies.base import Policy
from kvcache.policies.snapkv import SnapKV
from kvcache.registry import BUILT_IN, ENTRY_POINT_GROUP, PolicyError, make_policy, policies, policy_words
from tests.kvcache.synthetic import PagedCache, compress

NAMES = "none, streamingllm, l2norm, snapkv, pyramidkv, random"
ARGUMENTS = "budget, sinks, window, kernel, pooling, group_reduce, group_stage"
BUDGET = "a whole number of tokens or a share of the prompt such as '25%'"

MISTAKES: list[tuple[dict[str, Any], str, str, str]] = [
    ({"policy": "snapvk"}, "kv_cache.policy", "unknown policy 'snapvk'", NAMES),
    ({"policy": ["snapkv"]}, "kv_cache.policy", "unknown policy ['snapkv']", NAMES),
    ({"policy": None}, "kv_cache.policy", "unknown policy None", NAMES),
    ({"budget": 512}, "kv_cache.policy", "is missing", NAMES),
    ({}, "kv_cache.policy", "is missing", NAMES),
    ({"policy": "none", "budget": 512}, "kv_cache.budget", "takes no arguments", "no further fields"),
    ({"policy": "snapkv", "windw": 8}, "kv_cache.windw", "snapkv has no such argument", ARGUMENTS),
    ({"policy": "streamingllm", "window": 8}, "kv_cache.window", "streamingllm has no such argument", "budget, sinks"),
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
]


@pytest.mark.parametrize(("words", "field", "problem", "allowed"), MISTAKES, ids=lambda value: str(value)[:40])
def test_errors_name_the_field_and_what_is_allowed(
    words: dict[str, Any], field: str, problem: str, allowed: str
) -> None:
    with pytest.raises(PolicyError) as caught:
        make_policy(words)
    error = caught.value
    assert error.field == field and problem in error.problem and error.allowed == allowed
    message = str(error)
    assert message.startswith(f"{field}: ") and message.endswith(f" Allowed: {allowed}.")
    assert "pydantic" not in message and message.count("got ") <= 2 and "Value error" not in message


@pytest.mark.parametrize("words", [None, "snapkv", ["snapkv"], 5])
def test_words_that_are_no_object_are_errors(words: Any) -> None:
    with pytest.raises(PolicyError, match="kv_cache: must be an object"):
        make_policy(words)


@pytest.mark.parametrize("policy", sorted(policies()))
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


def test_every_argument_comes_back() -> None:
    words = {
        "policy": "pyramidkv", "budget": 99, "sinks": 0, "window": 5, "kernel": 3, "pooling": "avg",
        "group_reduce": "sum", "group_stage": "logits", "beta": 7,
    }  # fmt: skip
    assert policy_words(make_policy(words)) == words


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
    assert arguments["budget"]["default"] == 1024
    assert [form["type"] for form in arguments["budget"]["anyOf"]] == ["integer", "string"]
    assert all(argument["description"] and "default" in argument for argument in arguments.values())
    assert text["arguments"]["additionalProperties"] is False


def test_descriptions_of_builtin_policies_differ() -> None:
    assert list(policies()) == [policy.name for policy in BUILT_IN]
    for key in ("title", "paper", "description"):
        assert len({policy.describe()[key] for policy in BUILT_IN}) == len(BUILT_IN)


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
        monkeypatch.setattr(kvcache.registry, "entry_points", lambda group: groups[group])
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


@pytest.mark.parametrize("target", [Impostor, Nothing])
def test_policy_name_in_use_is_refused(install: Install, target: type[Policy]) -> None:
    install(FirstHalf, target)
    with pytest.raises(ValueError, match=f"entry point entry1: the policy name '{target.name}' is taken"):
        policies()


@pytest.mark.parametrize("target", [dict, FirstHalf(FirstHalf.Args.model_validate({})), "firsthalf", None], ids=str)
def test_entry_that_is_no_policy_is_refused(install: Install, target: Any) -> None:
    install(target)
    with pytest.raises(ValueError, match=rf"entry point entry0 of {ENTRY_POINT_GROUP} is not a kvcache Policy"):
        policies()
