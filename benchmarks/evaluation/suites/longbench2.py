"""LongBench v2 (Bai et al. 2024, arXiv 2412.15204): questions with four choices, from its `data.json`.

Wording is ours. Prompts that are too long lose their middle, as published.
"""

from __future__ import annotations

import re
from typing import Any

from benchmarks.evaluation.haystack import Haystack
from benchmarks.evaluation.suite import Place, Reply, Sample, Scored
from benchmarks.evaluation.suites.published import Published, cut_middle, read_entries
from benchmarks.evaluation.tokens import Prompt, Prompter

TASKS = ("short", "medium", "long")
"""The data's own classes of length."""
ANSWER_TOKENS = 128
HEAD = "Read the text and answer the question about it.\n\n"
ASK = "\n\nQuestion: {question}\n{choices}\n\nAnswer in this form: The correct answer is (X)."
CHOICES = "ABCD"


def choice(text: str) -> str | None:
    """The letter that an answer names, in brackets or not."""
    found = re.search(r"[Tt]he correct answer is:?\s*\**\(?([A-D])\b", text) or re.match(r"\s*\(?([A-D])\b", text)
    return found[1] if found else None


class LongBench2(Published):
    name = "longbench2"

    def tasks_here(self) -> list[str]:
        return [task for task in TASKS if self.entries(task)]

    def entries(self, task: str) -> list[dict[str, Any]]:
        path = next((self.folder / name for name in ("data.json", "data.jsonl") if (self.folder / name).exists()), None)
        if path is None:
            raise ValueError(f"longbench2: {self.folder} holds no data.json")
        return [entry for entry in read_entries(path) if entry.get("length") == task]

    def make(self, prompter: Prompter, haystack: Haystack, place: Place, variant: str) -> Sample:
        entry = self.entries(place.task)[place.index]
        try:
            choices = "\n".join(f"({letter}) {entry[f'choice_{letter}']}" for letter in CHOICES)
            tail = ASK.format(question=entry["question"], choices=choices)
            info = {"domain": entry["domain"], "difficulty": entry["difficulty"]}
            return Sample(
                place, prompter.prompt(HEAD + entry["context"], tail), ANSWER_TOKENS, (entry["answer"],), info=info
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"entry {place.index}: not in LongBench v2's format: {error!r}") from error

    def rate(self, sample: Sample, reply: Reply, dense: Any) -> Scored:
        return Scored(float(choice(reply.text) == sample.answers[0]))

    def complete(self, sample: Sample, reply: Reply) -> bool:
        """An answer that was cut before it came to its letter isn't a wrong one."""
        return choice(reply.text) is not None

    def cut(self, prompt: Prompt, room: int) -> Prompt | None:
        return cut_middle(prompt, room)
