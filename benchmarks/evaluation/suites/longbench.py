"""LongBench v1 (Bai et al. 2023, arXiv 2308.14508) from a folder with its files, `TASK.jsonl` each.

Where the folder also has LongBench's `dataset2prompt.json`, its prompts are used. Otherwise ours, which ask the same in
other words: then compare variants with each other, not with published figures. Prompts that are too long lose their
middle, as published; the row says how many tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from benchmarks.evaluation.haystack import Haystack
from benchmarks.evaluation.suite import Place, Reply, Sample, Scored
from benchmarks.evaluation.suites.published import Published, cut_middle, read_entries
from benchmarks.evaluation.text_metrics import (
    chinese_characters,
    classification,
    count,
    edit_similarity,
    english_words,
    f1,
    retrieval,
    rouge_l,
)
from benchmarks.evaluation.tokens import Prompt, Prompter

QA = "Answer the question by the text, as briefly as you can, and give nothing but the answer.\n\n{context}"
QA_ASK = "\n\nAnswer the question by the text above, as briefly as you can.\n\nQuestion: {input}\nAnswer:"
SUMMARY = "Read the following text.\n\n{context}"
FEW = "{context}"


@dataclass(frozen=True)
class Task:
    """One data set.

    Attributes:
        ask: what comes behind the context.
        chat: False for the tasks that are published to be run without a chat template.
        first_line: only the answer's first line is rated.
    """

    metric: str
    tokens: int
    ask: str
    head: str = QA
    chat: bool = True
    first_line: bool = False


QUERY = "\n\nAnswer the query by the text above, in one or more sentences.\n\nQuery: {input}\nAnswer:"
TASKS = {
    "narrativeqa": Task("f1", 128, QA_ASK),
    "qasper": Task("f1", 128, QA_ASK),
    "multifieldqa_en": Task("f1", 64, QA_ASK),
    "multifieldqa_zh": Task("f1_zh", 64, QA_ASK),
    "hotpotqa": Task("f1", 32, QA_ASK),
    "2wikimqa": Task("f1", 32, QA_ASK),
    "musique": Task("f1", 32, QA_ASK),
    "dureader": Task("rouge_zh", 128, QA_ASK),
    "gov_report": Task("rouge", 512, "\n\nSummarize the report on one page.\n\nSummary:", SUMMARY),
    "qmsum": Task("rouge", 512, QUERY, SUMMARY),
    "multi_news": Task("rouge", 512, "\n\nSummarize all the news on one page.\n\nSummary:", SUMMARY),
    "vcsum": Task("rouge_zh", 512, "\n\n请总结以上会议内容。\n\n会议总结:", SUMMARY),
    "trec": Task("class", 64, "\n{input}", FEW, chat=False, first_line=True),
    "triviaqa": Task("f1", 32, "\n\n{input}", FEW, chat=False, first_line=True),
    "samsum": Task("rouge", 128, "\n\n{input}", FEW, chat=False, first_line=True),
    "lsht": Task("class", 64, "\n{input}", FEW, chat=False, first_line=True),
    "passage_count": Task("count", 32, "\n\nHow many different paragraphs are there? Give the number.\n\nNumber:"),
    "passage_retrieval_en": Task(
        "retrieval", 32, "\n\nWhich paragraph is this a summary of? Answer as `Paragraph 1`.\n\n{input}\n\nAnswer:"
    ),
    "passage_retrieval_zh": Task("retrieval", 32, "\n\n以下摘要出自哪一段？请回答如“段落1”。\n\n{input}\n\n答案:"),  # noqa: RUF001
    "lcc": Task("edit", 64, "\nNext line of code:\n", "Complete the code below.\n{context}", chat=False),
    "repobench-p": Task("edit", 64, "{input}Next line of code:\n", "Complete the code below.\n{context}", chat=False),
}  # fmt: skip

BY_WORDS: dict[str, Callable[[str, str], float]] = {
    "f1": lambda answer, reference: f1(english_words(answer), english_words(reference)),
    "f1_zh": lambda answer, reference: f1(chinese_characters(answer), chinese_characters(reference)),
    "rouge": lambda answer, reference: rouge_l(answer.split(), reference.split()),
    "rouge_zh": lambda answer, reference: rouge_l(chinese_characters(answer), chinese_characters(reference)),
    "count": count,
    "retrieval": retrieval,
    "edit": edit_similarity,
}


class LongBench(Published):
    name = "longbench"

    tasks: list[str] = Field(default=[], description="left out: those that the folder holds")

    def tasks_here(self) -> list[str]:
        """
        Raises:
            ValueError: a task isn't LongBench's, or the folder holds none.
        """
        found = self.tasks or [task for task in TASKS if (self.folder / f"{task}.jsonl").exists()]
        if not found or set(found) - set(TASKS):
            raise ValueError(f"longbench: {self.folder} holds, or `tasks` names, others than {', '.join(TASKS)}")
        return found

    def entries(self, task: str) -> list[dict[str, Any]]:
        return read_entries(self.folder / f"{task}.jsonl")

    def make(self, prompter: Prompter, haystack: Haystack, place: Place, variant: str) -> Sample:
        task, entry = TASKS[place.task], self.entries(place.task)[place.index]
        try:
            head, tail = _prompt(self.folder, place.task, entry)
            answers = tuple(str(answer) for answer in entry["answers"])
            info = {"all_classes": entry["all_classes"]} if task.metric == "class" else {}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{place.task}, entry {place.index}: not in LongBench's format: {error!r}") from error
        own = prompter if task.chat else Prompter(prompter.tokenizer, chat=False)
        return Sample(place, own.prompt(head, tail), task.tokens, answers, info=info)

    def rate(self, sample: Sample, reply: Reply, dense: Any) -> Scored:
        task = TASKS[sample.place.task]
        answer = reply.text.lstrip("\n").split("\n")[0] if task.first_line else reply.text
        if task.metric == "class":
            classes = sample.info["all_classes"]
            scores = [classification(answer, reference, classes) for reference in sample.answers]
        else:
            scores = [BY_WORDS[task.metric](answer, reference) for reference in sample.answers]
        return Scored(max(scores, default=0.0))

    def cut(self, prompt: Prompt, room: int) -> Prompt | None:
        return cut_middle(prompt, room)


def _prompt(folder: Path, task: str, entry: dict[str, Any]) -> tuple[str, str]:
    """Up to and with the context, and what is behind it."""
    published = _published_prompts(folder).get(task)
    head, context, tail = (published or TASKS[task].head + TASKS[task].ask).partition("{context}")
    filled = [part.replace("{input}", entry["input"]) for part in (head, tail)]
    return filled[0] + (entry["context"] if context else ""), filled[1]


@cache
def _published_prompts(folder: Path) -> dict[str, str]:
    """
    Raises:
        ValueError: the file isn't a mapping.
    """
    for path in (folder / "dataset2prompt.json", folder / "config" / "dataset2prompt.json"):
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError(f"{path}: must map tasks to prompts")
            return content
    return {}
