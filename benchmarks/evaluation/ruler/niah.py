"""RULER's eight needle tasks: what is hidden, in what, and what is asked for."""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.evaluation.fitting import Build, Draft
from benchmarks.evaluation.haystack import Haystack, noise
from benchmarks.evaluation.words import numbers, uuids, word_names

DEPTHS = 40
"""Needles in running text lie at so many evenly spaced depths, each used once."""


@dataclass(frozen=True)
class Needles:
    """One task.

    Attributes:
        haystack: five sentences again and again, running text, or nothing but other needles.
        keys: needles with different keys; all but those that are asked for distract.
        values: needles with the same key.
        queries: keys that are asked for.
    """

    haystack: Literal["noise", "text", "needles"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


NIAH = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("text"),
    "niah_single_3": Needles("text", value="uuids"),
    "niah_multikey_1": Needles("text", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key="uuids", value="uuids"),
    "niah_multivalue": Needles("text", values=4),
    "niah_multiquery": Needles("text", keys=4, queries=4),
}

MAKE: dict[str, Callable[[random.Random, int], list[str]]] = {
    "words": word_names, "numbers": numbers, "uuids": uuids,
}  # fmt: skip
SINGULAR = {"numbers": "number", "uuids": "uuid"}


def needle(key: str, value: str, kind: str) -> str:
    return f"A secret {SINGULAR[kind]} of {key} is: {value}."


def listing(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def intro(kind: str) -> str:
    return f"Secret {kind} are hidden in the following text. Remember them: you will be asked for some of them.\n\n"


def question(keys: Sequence[str], kind: str, many: bool) -> tuple[str, str]:
    """The question for these keys' values, and the answer's first words."""
    if not many:
        return f"\n\nWhat is the secret {SINGULAR[kind]} of {keys[0]}?", f"The secret {SINGULAR[kind]} of {keys[0]} is:"
    asked = listing(keys)
    return f"\n\nWhat are all the secret {kind} of {asked} in the text?", f"All the secret {kind} of {asked} are:"


def hide(sentences: Sequence[str], needles: Sequence[str], depths: Sequence[float]) -> list[str]:
    """The sentences with each needle at its depth, 0 (in front) to 1 (behind all); of one place in the given order.

    Depth is measured in characters: the place is the sentence's end that is nearest to it.
    """
    ends = list(itertools.accumulate((len(sentence) for sentence in sentences), initial=0))
    middles = [(before + behind) / 2 for before, behind in itertools.pairwise(ends)]
    places = [(bisect.bisect(middles, depth * ends[-1]), text) for depth, text in zip(depths, needles, strict=True)]
    lines: list[str] = []
    done = 0
    for place, text in sorted(places, key=lambda pair: pair[0]):
        lines += [*sentences[done:place], text]
        done = place
    return lines + list(sentences[done:])


def niah(task: Needles, haystack: Haystack, seed: str) -> Build:
    """A unit is a sentence of noise, a word of running text, or a needle; padding is sentences of noise."""

    def build(units: int, padding: int) -> Draft:
        rng = random.Random(seed)
        own = MAKE[task.key](rng, task.keys)
        values = MAKE[task.value](rng, task.keys * task.values)
        told = [(key, values[i * task.values + j]) for i, key in enumerate(own) for j in range(task.values)]
        place = rng.random()
        shares = [depth / (DEPTHS - 1) for depth in rng.sample(range(DEPTHS), len(told))]
        asked = rng.sample(own, task.queries)
        if task.haystack == "needles":
            keys = [key for key in MAKE[task.key](rng, units + 1) if key not in own][:units]
            lines = [needle(k, v, task.value) for k, v in zip(keys, MAKE[task.value](rng, units), strict=False)]
        elif task.haystack == "noise":
            lines = noise(units)
        else:
            lines = haystack.sentences(units, place)
        lines = hide(lines, [needle(key, value, task.value) for key, value in told], shares)
        for sentence in noise(padding):
            lines.insert(rng.randrange(len(lines) + 1), sentence)
        answers = tuple(value for key, value in told if key in asked)
        tail, begun = question(asked, task.value, len(answers) > 1)
        joint = "\n" if task.haystack == "needles" else " "
        info = {"depth": shares[0]} if len(told) == 1 else {}
        return Draft(intro(task.value) + joint.join(lines), tail, answers, begun, info)

    return build
