"""A sweep's file: what it means, and what is said of a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from benchmarks.evaluation.suites.agreement import Agreement
from benchmarks.evaluation.suites.multiturn import MultiTurn
from benchmarks.evaluation.suites.needle import Needle
from benchmarks.evaluation.suites.perplexity import Perplexity
from benchmarks.evaluation.sweep import SweepError, check, load

SWEEPS = Path(__file__).resolve().parents[3] / "benchmarks" / "evaluation" / "sweeps"
NEUTRAL = {"kv_cache": {"policy": "none"}, "decode_attention": {"selector": "dense"}}


def sweep(**settings: Any) -> Any:
    return check({"suites": {"ruler": {"lengths": [1024]}}, **settings})


def test_a_sweep_becomes_variants() -> None:
    variants = sweep(
        policies=["snapkv", {"policy": "adakv", "floor": 0.1, "budget": 512}, "duoattention"],
        budgets=["1/2", "12.5%"], questions=["known", "unknown"],
        selectors=[{"selector": "quest", "tokens": 512, "min_context": 0}, "local"],
        patterns=["streaming", {"pattern": "flexprefill", "gamma": 0.9}],
        variants=[{"name": "both", "fields": {"kv_cache": {"policy": "tova"}, "top_k": 1}}],
    ).dense_and_others(NEUTRAL)  # fmt: skip
    assert [variant.name for variant in variants] == [
        "dense", "snapkv 50%", "snapkv 12.5%", "snapkv 50%, question unknown", "snapkv 12.5%, question unknown",
        "adakv,floor=0.1 512", "adakv,floor=0.1 512, question unknown", "duoattention",
        "duoattention, question unknown", "quest 512", "local", "streaming", "flexprefill,gamma=0.9", "both",
    ]  # fmt: skip
    by_name = {variant.name: variant for variant in variants}
    assert by_name["dense"].body(7) == NEUTRAL
    hidden = by_name["adakv,floor=0.1 512, question unknown"]
    words = {"policy": "adakv", "floor": 0.1, "budget": 512}
    assert hidden.body(33) == {**NEUTRAL, "kv_cache": {**words, "suffix": 33}}
    assert by_name["adakv,floor=0.1 512"].body(33) == {**NEUTRAL, "kv_cache": words}
    quest = {"selector": "quest", "tokens": 512, "min_context": 0}
    assert by_name["quest 512"].body(5) == {**NEUTRAL, "decode_attention": quest}
    pattern = by_name["flexprefill,gamma=0.9"]
    assert pattern.body(5) == {**NEUTRAL, "prefill_attention": {"pattern": "flexprefill", "gamma": 0.9}}
    assert by_name["both"].body(5)["top_k"] == 1 and by_name["both"].body(5)["kv_cache"] == {"policy": "tova"}
    groups = [by_name[name].group for name in ("dense", "duoattention", "local", "streaming", "both")]
    assert groups == ["dense", "policy", "selector", "pattern", "other"]
    assert (hidden.method, hidden.budget, hidden.question) == ("adakv,floor=0.1", "512", "unknown")


def test_suites_take_the_variants_that_make_sense() -> None:
    variants = sweep(policies=["snapkv"], budgets=["50%"], questions=["known", "unknown"], selectors=["quest"])
    names = {
        suite.name: [variant.name for variant in variants.dense_and_others({}) if variant.goes_with(suite)]
        for suite in (Needle(lengths=[9]), MultiTurn(lengths=[9]), Perplexity(lengths=[9]), Agreement(lengths=[9]))
    }
    known, unknown = "snapkv 50%", "snapkv 50%, question unknown"
    assert names == {
        "needle": ["dense", known, unknown, "quest"], "agreement": ["dense", known, unknown, "quest"],
        "multiturn": ["dense", unknown, "quest"], "perplexity": ["dense", unknown],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suites": {}}, "suites: "),
        ({"suites": {"rular": {}}}, "no suite 'rular'; there are ruler, needle"),
        ({"suites": {"ruler": {}}}, "ruler: lengths: Field required"),
        ({"suites": {"ruler": {"lengths": [512], "tasks": ["vtt"]}}}, "ruler: tasks.0: "),
        ({"suites": {"ruler": {"lengths": [512], "sampels": 3}}}, "ruler: sampels: Extra inputs"),
        ({"suites": {"longbench": {}}}, "longbench: folder: Field required"),
        ({"suites": 3}, "must be a mapping"),
        ({"budgets": ["150%"]}, "budgets: a budget is a share of the prompt in"),
        ({"budgets": ["much"]}, "budgets: "),
        ({"questions": ["maybe"]}, "questions.0: "),
        ({"policies": [{"budget": 5}]}, "`policy` must name a policy"),
        ({"policies": ["snapkv", "snapkv"]}, "variants of one name: snapkv 12.5%, snapkv 25%"),
        ({"selectors": [{"selector": "quest", "tokens": 5}, {"selector": "quest", "tokens": 5}]}, "one name: quest 5"),
        ({"variants": [{"fields": {}}]}, "variants.0.name: Field required"),
        ({"timeout": 30}, "timeout: "),
        ({"speed": 1}, "speed: Extra inputs"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SweepError) as caught:
        sweep(**settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("suites: [", "while parsing"), ("- 1", "must be a mapping"), (None, "No such file")]
)
def test_files_that_are_none(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SweepError, match=message):
        load(path)


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_sweeps_that_come_along_are_right(path: Path) -> None:
    assert check(load(path)).suites


def test_the_embedded_sweep_is_as_wide_as_promised() -> None:
    content = load(SWEEPS / "embedded.yaml")
    variants = check(content).dense_and_others({})
    methods = {group: {v.method for v in variants if v.group == group} for group in ("policy", "selector", "pattern")}
    assert len(methods["policy"]) >= 8 and len(content["budgets"]) == 4
    assert len({method.split(",")[0] for method in methods["selector"]}) >= 4 and len(methods["pattern"]) >= 4
    assert yaml.safe_load(yaml.safe_dump(content)) == content
