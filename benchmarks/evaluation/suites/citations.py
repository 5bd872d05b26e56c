"""L-CiteEval (Tang et al. 2024, arXiv 2410.02115) from a folder with its files, `TASK.json` each.

Does an answer from a compressed cache still cite the passages that hold it? The score is the citations' F1. Wording is
ours, with one example; `niah` and `counting_stars` are rated by the right passages, the others by `judge`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from benchmarks.evaluation import citing
from benchmarks.evaluation.haystack import Haystack
from benchmarks.evaluation.suite import Place, Reply, Sample, Scored
from benchmarks.evaluation.suites.published import Published, read_entries
from benchmarks.evaluation.text_metrics import english_words, f1
from benchmarks.evaluation.tokens import Prompter

GOLD = ("niah", "counting_stars")
TASKS = {
    "narrativeqa": 200, "natural_questions": 200, "hotpotqa": 200, "2wikimultihopqa": 200, "locomo": 200,
    "dialsim": 200, "niah": 128, "counting_stars": 128, "multi_news": 800, "gov_report": 800, "qmsum": 800,
}  # fmt: skip
"""Tokens of an answer, as published."""
SUMMARIES = ("multi_news", "gov_report", "qmsum")
HEAD = (
    "Answer by the numbered passages. Behind every sentence, cite in square brackets the numbers of the passages that "
    "it is taken from, three at most. Example: The bridge was built in 1907 [2][5].\n\n"
)
STARS = (
    "\n\nA little penguin counts stars in some of the passages. Give the counts and the numbers of their passages, in "
    'order, as JSON: {"little_penguin": [...], "passage_id": [...]}'
)


class Citations(Published):
    name = "citations"

    tasks: list[str] = Field(default=[], description="left out: those that the folder holds and that can be rated")
    judge: Path | None = Field(default=None, description="folder of an entailment classifier")

    def tasks_here(self) -> list[str]:
        """
        Raises:
            ValueError: a task isn't L-CiteEval's, or can't be rated without a judge, or the folder holds none.
        """
        there = [task for task in TASKS if (self.folder / f"{task}.json").exists()]
        found = self.tasks or [task for task in there if self.judge or task in GOLD]
        if not found or set(found) - set(TASKS):
            raise ValueError(f"citations: {self.folder} holds nothing to rate; tasks are {', '.join(TASKS)}")
        if not self.judge and (need := [task for task in found if task not in GOLD]):
            raise ValueError(f"citations: {', '.join(need)} can't be rated without `judge`, a classifier's folder")
        return found

    def entries(self, task: str) -> list[dict[str, Any]]:
        return read_entries(self.folder / f"{task}.json")

    def make(self, prompter: Prompter, haystack: Haystack, place: Place, variant: str) -> Sample:
        entry = self.entries(place.task)[place.index]
        try:
            texts = [citing.passage(document) for document in entry["docs"]]
            answer = entry["answer"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{place.task}, entry {place.index}: not in L-CiteEval's format: {error!r}") from error
        document = "\n".join(f"Passage [{number}]: {text}" for number, text in enumerate(texts, 1))
        asked = "Summarize the passages." if place.task in SUMMARIES else f"Question: {entry.get('question') or ''}"
        tail = STARS if place.task == "counting_stars" else f"\n\n{asked}"
        answers = tuple(map(str, answer)) if isinstance(answer, list) else (str(answer),)
        return Sample(place, prompter.prompt(HEAD + document, tail), TASKS[place.task], answers)

    def rate(self, sample: Sample, reply: Reply, dense: Any) -> Scored:
        documents = self.entries(sample.place.task)[sample.place.index]["docs"]
        if sample.place.task == "niah":
            found = citing.needle(reply.text, documents, sample.answers[0])
        elif sample.place.task == "counting_stars":
            found = citing.stars(reply.text, documents, sample.answers)
        else:
            assert self.judge is not None
            found = citing.by_entailment(reply.text, documents, citing.load_judge(self.judge))
        said = english_words(citing.without_citations(reply.text))
        measures = {
            "citation_recall": found.recall, "citation_precision": found.precision,
            "answer_f1": max((f1(said, english_words(answer)) for answer in sample.answers), default=0.0),
        }  # fmt: skip
        return Scored(found.f1, measures)
