"""RULER's variable tracking: a value is handed from variable to variable, statements apart; which hold it?"""

from __future__ import annotations

import itertools
import random
import string

from benchmarks.evaluation.fitting import Build, Draft
from benchmarks.evaluation.haystack import noise
from benchmarks.evaluation.ruler.niah import hide, listing

HOPS = 4
INSTRUCTION = "The text below contains variable assignments. Follow them: which variable holds what?\n\n"
EXAMPLE_NOISE = 6


def chain(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """A value, the variables that come to hold it, and the statements, in their order."""
    value = str(rng.randrange(10_000, 100_000))
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    statements = [f"VAR {names[0]} = {value}."]
    statements += [f"VAR {name} = VAR {held}." for held, name in itertools.pairwise(names)]
    return value, names, statements


def told(rng: random.Random, statements: list[str], sentences: int) -> str:
    """Statements keep their order; their places are random."""
    places = sorted(rng.random() for _ in statements)
    return " ".join(hide(noise(sentences), statements, places))


def question(value: str) -> str:
    return f"\n\nWhich variables hold the value {value}?"


def begin(value: str) -> str:
    return f"The variables that hold the value {value} are, in the order of their assignment:"


def tracing(seed: str) -> Build:
    """A unit is a sentence of noise. An example with its answer comes first."""

    def build(units: int, padding: int) -> Draft:
        rng = random.Random(seed)
        shown, names, statements = chain(rng)
        example = f"{told(rng, statements, EXAMPLE_NOISE)}{question(shown)}\n{begin(shown)} {listing(names)}.\n\n\n"
        value, names, statements = chain(rng)
        document = told(rng, statements, units + padding)
        return Draft(f"{INSTRUCTION}{example}{INSTRUCTION}{document}", question(value), tuple(names), begin(value))

    return build
