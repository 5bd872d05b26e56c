"""RULER: 13 tasks of retrieval, tracing, aggregation and question answering."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from benchmarks.evaluation.fitting import Build, fit
from benchmarks.evaluation.haystack import Haystack
from benchmarks.evaluation.metrics import string_match_all, string_match_part
from benchmarks.evaluation.ruler.counting import common_words, frequent_words
from benchmarks.evaluation.ruler.niah import NIAH, niah
from benchmarks.evaluation.ruler.qa import Source, qa, read_hotpotqa, read_squad
from benchmarks.evaluation.ruler.tracing import tracing
from benchmarks.evaluation.ruler.world import world
from benchmarks.evaluation.suite import Place, Reply, Sample, Scored, Suite
from benchmarks.evaluation.tokens import Prompter

Task = Literal[
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
]  # fmt: skip
TASKS: tuple[str, ...] = get_args(Task)
ANSWER_TOKENS = {**dict.fromkeys(NIAH, 128), "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}


class Ruler(Suite):
    name = "ruler"

    tasks: list[Task] = Field(default_factory=lambda: list(get_args(Task)), min_length=1)
    squad: Path | None = Field(default=None, description="qa_1 asks of this SQuAD file (JSON)")
    hotpotqa: Path | None = Field(default=None, description="qa_2 asks of this HotpotQA file (JSON)")

    def tasks_here(self) -> list[str]:
        return list(self.tasks)

    def source(self, task: str) -> Source:
        """
        Raises:
            ValueError: a file isn't of its format.
        """
        if task == "qa_1":
            return _squad(self.squad) if self.squad else world()[0]
        return _hotpotqa(self.hotpotqa) if self.hotpotqa else world()[1]

    def build(self, haystack: Haystack, place: Place) -> Build:
        if place.task in NIAH:
            return niah(NIAH[place.task], haystack, place.words)
        if place.task == "vt":
            return tracing(place.words)
        if place.task == "cwe":
            return common_words(haystack, place.length, place.words)
        if place.task == "fwe":
            return frequent_words(place.words)
        return qa(self.source(place.task), place.words)

    def make(self, prompter: Prompter, haystack: Haystack, place: Place, variant: str) -> Sample:
        answer = ANSWER_TOKENS[place.task]
        fitted = fit(prompter, self.build(haystack, place), place.length - answer)
        return Sample(place, fitted.prompt, answer, fitted.draft.answers, info=fitted.draft.info)

    def rate(self, sample: Sample, reply: Reply, dense: Any) -> Scored:
        match = string_match_part if sample.place.task.startswith("qa") else string_match_all
        return Scored(match(reply.text, sample.answers))


@cache
def _squad(path: Path) -> Source:
    return read_squad(path)


@cache
def _hotpotqa(path: Path) -> Source:
    return read_hotpotqa(path)
