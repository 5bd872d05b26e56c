"""The desk where a request's words are checked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kvcache.namm import NO_WEIGHTS
from kvcache.policies.base import Policy, PolicyArgs
from kvcache.registry import PolicyError, policies
from server.policies import PolicyDesk


def test_a_checked_policy_names_every_argument() -> None:
    desk = PolicyDesk({"policy": "none"}, 32)
    assert desk.check({"policy": "none"}) == {"policy": "none"}
    words = desk.check({"policy": "streamingllm", "budget": "25%"})
    assert words == {"policy": "streamingllm", "budget": "25%", "sinks": 4, "suffix": 0, "interval": 0}
    assert desk.check(words) == words


def test_the_default_is_checked_like_a_request() -> None:
    assert PolicyDesk({"policy": "random", "budget": 512}, 32).default["seed"] == 0
    with pytest.raises(PolicyError, match="unknown policy"):
        PolicyDesk({"policy": "lru"}, 32)


@pytest.mark.parametrize("page_size", [16, 32, 128])
def test_the_smallest_budget_is_taken_and_one_less_is_not(page_size: int) -> None:
    desk = PolicyDesk({"policy": "none"}, page_size)
    for described in desk.describe()["data"][1:]:
        least = described["minimum_budget"]
        if least is None:  # keeps what its gates say
            continue
        assert desk.check({"policy": described["name"], "budget": least})["budget"] == least
        with pytest.raises(PolicyError, match=f"budget: {least - 1} is too small.*>= {least} tokens"):
            desk.check({"policy": described["name"], "budget": least - 1})


def test_larger_windows_need_larger_budgets() -> None:
    desk = PolicyDesk({"policy": "none"}, 16)
    assert desk.check({"policy": "snapkv", "budget": 100, "window": 32})
    with pytest.raises(PolicyError, match=">= 132 tokens"):
        desk.check({"policy": "snapkv", "budget": 100, "window": 64, "sinks": 36})


def test_a_suffix_needs_room_where_answers_are_compacted() -> None:
    desk = PolicyDesk({"policy": "none"}, 16)
    assert desk.check({"policy": "snapkv", "budget": 100, "suffix": 5000})["interval"] == 0
    assert desk.check({"policy": "snapkv", "budget": 118, "suffix": 50, "interval": 64})
    with pytest.raises(PolicyError, match=r">= 118 tokens \(sinks, recent window, the suffix, which") as caught:
        desk.check({"policy": "snapkv", "budget": 117, "suffix": 50, "interval": 64})
    assert caught.value.field == "kv_cache.budget"
    assert desk.check({"policy": "raas", "budget": 64, "suffix": 5000}), "the whole prompt stays anyway"


def test_small_shares_are_taken_since_prompts_differ() -> None:
    assert PolicyDesk({"policy": "none"}, 128).check({"policy": "snapkv", "budget": "0.1%"})["budget"] == "0.1%"


def test_without_an_adapter_only_none_is_taken() -> None:
    desk = PolicyDesk({"policy": "none"}, 32, unavailable="no adapter")
    assert desk.check({"policy": "none"}) == {"policy": "none"}
    with pytest.raises(PolicyError) as caught:
        desk.check({"policy": "snapkv"})
    assert (caught.value.field, caught.value.allowed) == ("kv_cache.policy", "none")
    assert "no adapter" in caught.value.problem
    with pytest.raises(PolicyError, match="unknown policy"):
        desk.check({"policy": "nonsense"})


@pytest.mark.parametrize("words", [None, 5, "none", [], {"policy": None}, {"policy": ["none"]}, {"Policy": "none"}])
def test_nonsense_is_refused(words: Any) -> None:
    with pytest.raises(PolicyError):
        PolicyDesk({"policy": "none"}, 32).check(words)


def test_the_description_lists_all_policies_with_their_arguments() -> None:
    content = PolicyDesk({"policy": "random"}, 32).describe()
    assert json.loads(json.dumps(content)) == content
    assert content["default"]["policy"] == "random"
    assert (content["page_size"], content["available"], content["unavailable_reason"]) == (32, True, None)
    assert [policy["name"] for policy in content["data"]] == ["none", *policies()]
    for policy in content["data"]:
        assert policy["title"] and policy["paper"] and policy["arguments"]["type"] == "object"
        assert policy["arguments"]["additionalProperties"] is False
    assert PolicyDesk({"policy": "none"}, 32, "why").describe()["unavailable_reason"] == "why"


def test_the_description_lists_all_allocators_with_their_arguments() -> None:
    allocators = PolicyDesk({"policy": "none"}, 32).describe()["allocators"]
    assert {field: [part["name"] for part in known] for field, known in allocators.items()} == {
        "layers": ["uniform", "pyramid", "zigzag", "zipvl", "d2o"],
        "heads": ["equal", "adakv"],
    }
    everyone = [part for known in allocators.values() for part in known]
    arguments = {part["name"]: set(part["arguments"]["properties"]) for part in everyone}
    assert arguments == {
        "uniform": set(), "pyramid": {"beta"}, "zigzag": {"window", "mass", "bound"}, "zipvl": {"window", "tau"},
        "d2o": {"whole_first", "whole_last"}, "equal": set(), "adakv": {"floor"},
    }  # fmt: skip
    assert all(part["title"] and part["paper"] and part["description"] for part in everyone)


def test_chosen_allocators_are_checked_and_told() -> None:
    desk = PolicyDesk({"policy": "none"}, 16)
    words = desk.check({"policy": "l2norm", "layers": "zigzag", "heads": "adakv", "window": 100})
    assert words.items() >= {"layers": "zigzag", "heads": "adakv", "window": 100, "mass": 0.9, "floor": 0.2}.items()
    assert desk.check(words) == words
    with pytest.raises(PolicyError, match=r"kv_cache\.heads: there is no such allocator: 'ada'.*Allowed: equal, adakv"):
        desk.check({"policy": "l2norm", "heads": "ada"})
    # The window's queries have to fit: 100 + 4 sinks + two pages.
    assert desk.check({"policy": "l2norm", "layers": "zigzag", "window": 100, "budget": 136})
    with pytest.raises(PolicyError, match=">= 136 tokens"):
        desk.check({"policy": "l2norm", "layers": "zigzag", "window": 100, "budget": 135})


class Needy(Policy):
    """A third party's policy whose argument has no default."""

    name = "needy"
    title = "Needy"
    paper = "none"

    class Args(PolicyArgs):
        target: int

    def scores(self, evidence: Any) -> Any:
        pytest.fail("nothing is scored here")


def test_a_policy_with_a_needed_argument_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    everyone = {**policies(), "needy": Needy}
    monkeypatch.setattr("kvcache.registry.policies", lambda: everyone)
    monkeypatch.setattr("server.policies.policies", lambda: everyone)
    desk = PolicyDesk({"policy": "none"}, 32)
    assert desk.describe()["data"][-1]["minimum_budget"] is None
    assert desk.check({"policy": "needy", "target": 5})["target"] == 5
    with pytest.raises(PolicyError, match=r"kv_cache\.target"):
        desk.check({"policy": "needy"})


def test_policies_without_their_evidence_are_refused_with_the_reason() -> None:
    desk = PolicyDesk({"policy": "none"}, 32)
    desk.check({"policy": "expectedattention"})
    desk.lacks({"query moments": "the model has no rotary embedding"})
    with pytest.raises(PolicyError) as caught:
        desk.check({"policy": "expectedattention", "layers": "zigzag"})
    error = caught.value
    assert error.field == "kv_cache.policy" and "the model has no rotary embedding" in error.problem
    assert "snapkv" in error.allowed and "expectedattention" not in error.allowed
    assert desk.check({"policy": "snapkv"}) and desk.check({"policy": "none"})
    reasons = {policy["name"]: policy.get("unavailable_reason") for policy in desk.describe()["data"]}
    assert "no rotary embedding" in str(reasons["expectedattention"]) and reasons["snapkv"] is None


def test_a_default_without_its_evidence_is_an_error() -> None:
    desk = PolicyDesk({"policy": "expectedattention"}, 32)
    desk.lacks({})
    with pytest.raises(PolicyError, match="expectedattention needs query moments"):
        desk.lacks({"query moments": "why"})


def test_namm_without_weights_is_refused_with_the_flag_to_give() -> None:
    desk = PolicyDesk({"policy": "none"}, 32)
    desk.lacks({"attention spectrograms": NO_WEIGHTS})
    with pytest.raises(PolicyError, match=r"namm needs attention spectrograms.*\(--kv-namm-weights FILE\)"):
        desk.check({"policy": "namm"})
