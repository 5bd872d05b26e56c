"""L-CiteEval's citation metrics (Tang et al. 2024, arXiv 2410.02115): does the cited text hold what is said?

Answers cite passages as `[3]`. `niah` and `counting_stars` know the right passages. Everything else needs a judge of
entailment; L-CiteEval's is a DeBERTa classifier, which nothing here ships or fetches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

Judge = Callable[[str, str], bool]
"""Whether the first text entails the second."""
MOST = 3
"""Citations of a sentence that count."""


@dataclass(frozen=True)
class Citations:
    """Recall, precision and their harmonic mean, each 0 to 1."""

    recall: float
    precision: float

    @property
    def f1(self) -> float:
        both = self.recall + self.precision
        return 2 * self.recall * self.precision / both if both else 0.0


def cited(sentence: str) -> list[int]:
    """Numbers in square brackets, counted from 0; a bracket may hold several (`[1][2]` or `[1, 2]`)."""
    brackets = re.findall(r"\[([\d,\s]+)\]?", sentence)
    return [int(number) - 1 for bracket in brackets for number in re.findall(r"\d+", bracket)]


def without_citations(sentence: str) -> str:
    return re.sub(r"\s*\[[\d,\s]+\]?", "", sentence).strip()


def sentences(text: str) -> list[str]:
    """Split behind full stops, question and exclamation marks, with the citations that follow."""
    parts = re.split(r"(?<=[.!?])(?:\s+(?!\[)|$)|(?<=\])\s+(?=[A-Z\"'])", text.strip())
    return [part for part in parts if part and part.strip()]


def passage(document: Any) -> str:
    return document if isinstance(document, str) else f"{document.get('title', '')}\n{document['text']}".strip()


def by_entailment(answer: str, documents: Sequence[Any], entails: Judge) -> Citations:
    """Of every sentence: is it entailed by what it cites together (recall), and is each citation needed (precision)?

    A citation is needed if it entails the sentence alone, or if the others don't without it.
    """
    told = sentences(answer)
    supported = needed = total = 0
    for sentence in told:
        claim, numbers = without_citations(sentence), cited(sentence)
        if not numbers or any(not 0 <= number < len(documents) for number in numbers):
            continue
        numbers = numbers[:MOST]
        total += len(numbers)
        texts = [passage(documents[number]) for number in numbers]
        if not entails("\n".join(texts), claim):
            continue
        supported += 1
        if len(texts) == 1:
            needed += 1
            continue
        for place, text in enumerate(texts):
            others = "\n".join(texts[:place] + texts[place + 1 :])
            needed += entails(text, claim) or not entails(others, claim)
    return Citations(supported / len(told) if told else 0.0, needed / total if total else 0.0)


def by_gold(numbers: Sequence[int], gold: Sequence[int]) -> Citations:
    """Cited passages against the right ones."""
    right = len(set(numbers) & set(gold))
    return Citations(right / len(gold) if gold else 0.0, right / len(numbers) if numbers else 0.0)


def needle(answer: str, documents: Sequence[Any], reference: str) -> Citations:
    """`niah`: the passage that holds the reference, against those that the answer's first line cites."""
    gold = [number for number, document in enumerate(documents) if reference in passage(document)][:1]
    return by_gold(cited(answer.strip().split("\n")[0])[:MOST], gold)


def stars(answer: str, documents: Sequence[Any], wanted: Sequence[Any]) -> Citations:
    """`counting_stars`: passages that hold a count, against `passage_id` of the JSON object in the answer."""
    gold = [number for number, document in enumerate(documents) if re.search(r"counted \d+ ★", passage(document))]
    found = re.search(r"\{.*?\}", answer, re.DOTALL)
    try:
        told = json.loads(found[0])["passage_id"] if found else []
        numbers = [int(number) - 1 for number in dict.fromkeys(told)]
    except (ValueError, KeyError, TypeError):
        numbers = []
    return by_gold(numbers, gold)


@cache
def load_judge(folder: Path) -> Judge:
    """A classifier of entailment, from a local folder in transformers' format.

    Raises:
        ValueError: it isn't one.
    """
    from transformers import pipeline

    try:
        classify = pipeline("text-classification", model=str(folder))
    except (OSError, ValueError) as error:
        raise ValueError(f"judge {folder}: {error}") from error

    def entails(premise: str, claim: str) -> bool:
        return str(classify([{"text": premise, "text_pair": claim}])[0]["label"]).lower() == "entailment"

    return entails
