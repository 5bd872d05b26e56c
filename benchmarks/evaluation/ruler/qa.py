"""RULER's question answering: the paragraphs that hold the answer, among others from the same source."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evaluation.fitting import Build, Draft

INSTRUCTION = "Answer the question by the given documents. Give the answer alone, nothing else.\n\n"
REMINDER = "\n\nAnswer the question by the given documents. Give the answer alone, nothing else.\n\nQuestion: "


@dataclass(frozen=True)
class Question:
    """`gold`: numbers of the paragraphs that are needed."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Paragraphs, and questions about them."""

    name: str
    paragraphs: Sequence[str]
    questions: Sequence[Question]


def read_squad(path: Path) -> Source:
    """SQuAD 1.1 or 2.0 as published; questions without an answer are left out.

    Raises:
        ValueError: the file isn't of that format.
    """
    paragraphs: list[str] = []
    questions: list[Question] = []
    try:
        for article in _read(path)["data"]:
            for paragraph in article["paragraphs"]:
                paragraphs.append(paragraph["context"])
                for asked in paragraph["qas"]:
                    answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                    if answers and not asked.get("is_impossible"):
                        questions.append(Question(asked["question"], answers, (len(paragraphs) - 1,)))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} isn't in SQuAD's format: {error!r}") from error
    return _checked(Source(path.name, paragraphs, questions))


def read_hotpotqa(path: Path) -> Source:
    """HotpotQA (distractor setting) as published.

    Raises:
        ValueError: the file isn't of that format.
    """
    numbers: dict[str, int] = {}
    questions: list[Question] = []
    try:
        for entry in _read(path):
            titles = {}
            for title, sentences in entry["context"]:
                titles[title] = numbers.setdefault(f"{title}\n{''.join(sentences)}", len(numbers))
            gold = tuple(dict.fromkeys(titles[title] for title, _ in entry["supporting_facts"] if title in titles))
            questions.append(Question(entry["question"], (entry["answer"],), gold))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} isn't in HotpotQA's format: {error!r}") from error
    return _checked(Source(path.name, list(numbers), questions))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _checked(source: Source) -> Source:
    if not source.questions:
        raise ValueError(f"{source.name} holds no questions with answers")
    return source


def qa(source: Source, seed: str) -> Build:
    """A unit is a distracting paragraph; padding is the first words of one more. Order is random."""

    def build(units: int, padding: int) -> Draft:
        rng = random.Random(seed)
        question = source.questions[rng.randrange(len(source.questions))]
        others = [number for number in range(len(source.paragraphs)) if number not in question.gold]
        rng.shuffle(others)
        if units + bool(padding) > len(others):
            raise ValueError(f"{source.name} has too few paragraphs for this length: {len(source.paragraphs)}")
        texts = [source.paragraphs[number] for number in [*question.gold, *others[:units]]]
        if padding:
            texts.append(" ".join(source.paragraphs[others[units]].split()[:padding]))
        rng.shuffle(texts)
        documents = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(texts, 1))
        return Draft(INSTRUCTION + documents, REMINDER + question.text, question.answers, "Answer:")

    return build
