"""The file of a sweep: policies x budgets, selectors, patterns, suites, lengths, seeds; checked before a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator

from benchmarks.evaluation.suite import KNOWN, Question, Suite
from benchmarks.evaluation.suites.agreement import Agreement
from benchmarks.evaluation.suites.citations import Citations
from benchmarks.evaluation.suites.longbench import LongBench
from benchmarks.evaluation.suites.longbench2 import LongBench2
from benchmarks.evaluation.suites.multiturn import MultiTurn
from benchmarks.evaluation.suites.needle import Needle, PasskeySuite
from benchmarks.evaluation.suites.perplexity import Perplexity
from benchmarks.evaluation.suites.ruler import Ruler
from benchmarks.evaluation.suites.speed import Speed
from benchmarks.evaluation.variants import DENSE, OTHER, PATTERN, POLICY, SELECTOR, Variant
from benchmarks.quality.arithmetic import budget_words

SUITES: dict[str, type[Suite]] = {
    suite.name: suite
    for suite in (
        Ruler, Needle, PasskeySuite, MultiTurn, Perplexity, Agreement, LongBench, LongBench2, Citations, Speed,
    )
}  # fmt: skip


NOT_NAMED = ("budget", "tokens", "min_context")
"""Arguments that aren't a part of a method's label: how much of it, and from which length on."""


class SweepError(ValueError):
    """A sweep's file is wrong; says where and what is allowed."""


class Named(BaseModel):
    """A variant spelled out: any fields of a request."""

    model_config = ConfigDict(extra="forbid")

    name: str
    fields: dict[str, Any]


class Sweep(BaseModel):
    """Settings of a run. Every suite in `suites` is run with every variant."""

    model_config = ConfigDict(extra="forbid")

    suites: dict[str, SerializeAsAny[Suite]] = Field(min_length=1, description="by name, each with its own settings")
    seeds: list[int] = Field(default=[0], min_length=1)
    policies: list[str | dict[str, Any]] = Field(default=[], description="names, or fields of `kv_cache`")
    budgets: list[str | int] = Field(default=["50%", "25%", "12.5%", "6.25%"], description="of every policy")
    questions: list[Question] = Field(default=["known"], min_length=1, description="does compaction see the question?")
    selectors: list[str | dict[str, Any]] = Field(default=[], description="names, or fields of `decode_attention`")
    patterns: list[str | dict[str, Any]] = Field(default=[], description="names, or fields of `prefill_attention`")
    variants: list[Named] = Field(default=[], description="anything else, by name and request fields")
    haystack: list[Path] = Field(default=[], description="text files; left out, Python's language reference")
    concurrency: int = Field(default=8, ge=1)
    timeout: float = Field(default=1800.0, ge=60.0, description="seconds for one request")
    chat: bool = Field(default=True, description="put prompts into the model's chat template")
    serve: list[str | int | float] = Field(default=[], description="flags of `longreach serve`, where one is started")

    @field_validator("suites", mode="before")
    @classmethod
    def _own_settings(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise ValueError("must be a mapping from a suite's name to its settings")
        found: dict[str, Suite] = {}
        for name, settings in value.items():
            if name not in SUITES:
                raise ValueError(f"no suite {name!r}; there are {', '.join(SUITES)}")
            if isinstance(settings, Suite):
                found[name] = settings
                continue
            try:
                found[name] = SUITES[name].model_validate(settings)
            except ValidationError as error:
                raise ValueError(f"{name}: {explain(error)}") from error
        return found

    @field_validator("budgets")
    @classmethod
    def _as_requests_have_them(cls, value: list[str | int]) -> list[str | int]:
        return [budget_words(str(budget)) for budget in value]

    def dense_and_others(self, neutral: Mapping[str, Any]) -> list[Variant]:
        """All variants, the dense one first.

        Args:
            neutral: fields that make a request dense here; every variant carries those that it doesn't set.

        Raises:
            SweepError: two variants have one name.
        """
        found = [Variant(DENSE, dict(neutral), DENSE, DENSE)]
        found += [
            Variant(v.name, {**neutral, **v.fields}, v.group, v.method, v.budget, v.question) for v in self._variants()
        ]
        names = [variant.name for variant in found]
        if twice := {name for name in names if names.count(name) > 1}:
            raise SweepError(f"variants of one name: {', '.join(sorted(twice))}")
        return found

    def _variants(self) -> Iterator[Variant]:
        for entry in self.policies:
            label, words = _words(entry, "policy")
            budgets: list[str | int | None] = [words["budget"]] if "budget" in words else list(self.budgets)
            budgets = budgets if words["policy"] != "duoattention" else [None]
            for question in self.questions:
                for budget in budgets:
                    own = {**words} if budget is None else {**words, "budget": budget}
                    at = "" if budget is None else f" {budget}"
                    hidden = "" if question == KNOWN else ", question unknown"
                    told = None if budget is None else str(budget)
                    yield Variant(f"{label}{at}{hidden}", {"kv_cache": own}, POLICY, label, told, question)
        for entry in self.selectors:
            label, words = _words(entry, "selector")
            read = str(words["tokens"]) if "tokens" in words else None
            name = f"{label} {read}" if read else label
            yield Variant(name, {"decode_attention": words}, SELECTOR, label, read)
        for entry in self.patterns:
            label, words = _words(entry, "pattern")
            yield Variant(label, {"prefill_attention": words}, PATTERN, label)
        for named in self.variants:
            yield Variant(named.name, named.fields, OTHER, named.name)


def _words(entry: str | dict[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """A label, and the request's words."""
    words = {name: entry} if isinstance(entry, str) else dict(entry)
    if not isinstance(words.get(name), str):
        raise SweepError(f"{entry}: `{name}` must name a {name}")
    told = [f"{key}={value}" for key, value in words.items() if key not in (name, *NOT_NAMED)]
    return ",".join([words[name], *told]).replace(" ", ""), words


def explain(error: ValidationError) -> str:
    """One line: each place and what is wrong there."""
    lines = []
    for detail in error.errors():
        where = ".".join(str(part) for part in detail["loc"])
        lines.append(f"{where}: {detail['msg'].removeprefix('Value error, ')}" if where else str(detail["msg"]))
    return "; ".join(dict.fromkeys(lines))


def check(content: Any, where: str = "the sweep") -> Sweep:
    """
    Raises:
        SweepError: the settings are wrong.
    """
    if not isinstance(content, Mapping):
        raise SweepError(f"{where}: must be a mapping of {', '.join(Sweep.model_fields)}")
    try:
        sweep = Sweep.model_validate(content)
    except ValidationError as error:
        raise SweepError(f"{where}: {explain(error)}") from error
    sweep.dense_and_others({})
    return sweep


def load(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, not yet checked; relative paths in it are relative to where the command runs.

    Raises:
        SweepError: it can't be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SweepError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SweepError(f"{path}: must be a mapping of {', '.join(Sweep.model_fields)}")
    return content
