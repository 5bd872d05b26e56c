"""RULER's aggregation tasks: the ten most common words of a list, and the most frequent words of a coded text."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence

from benchmarks.evaluation.fitting import Build, Draft
from benchmarks.evaluation.haystack import Haystack
from benchmarks.evaluation.ruler.niah import listing

COMMON = 10
LONG = 4096
"""From this length on a common word stands 30 times in the list and others 3 times; below, 6 times and once."""

CWE_INSTRUCTION = "Below is a numbered list of words. Some of them stand in it more often than others.\n\n"
CWE_QUESTION = f"\n\nWhich {COMMON} words stand in the list most often?"
CWE_BEGUN = f"The {COMMON} words that stand in the list most often are:"

ALPHA = 2.0
ZETA = 1.6449340668482264
"""The zeta function at ALPHA: the k-th most frequent word has a share of k^-ALPHA / ZETA."""
FWE_INSTRUCTION = "Below is a text of coded words. Notice how often each of them comes. Dots are no words.\n\n"
FWE_QUESTION = "\n\nWhich three coded words come most often in the text? Don't explain."
FWE_BEGUN = "The three coded words that come most often in the text are:"
DOTS = "......"


def word_list(rng: random.Random, entries: Sequence[str]) -> str:
    """Numbered, in random order."""
    return " ".join(f"{number}. {word}" for number, word in enumerate(rng.sample(entries, len(entries)), 1))


def common_words(haystack: Haystack, length: int, seed: str) -> Build:
    """A unit is one uncommon word with its repetitions, padding an uncommon word that stands there once.

    Words are those of the haystack text. An example with its answer comes first.
    """
    often, seldom = (30, 3) if length >= LONG else (6, 1)
    example_words, example_often, example_seldom = (40, 10, 3) if length >= LONG else (20, 3, 1)

    def build(units: int, padding: int) -> Draft:
        rng = random.Random(seed)
        needed = example_words + COMMON + units + padding
        if needed > len(haystack.vocabulary):
            raise ValueError(f"cwe needs {needed:,} words and the haystack has {len(haystack.vocabulary):,}: give more")
        words = rng.sample(haystack.vocabulary, len(haystack.vocabulary))[:needed]
        shown, words = words[:example_words], words[example_words:]
        example = word_list(rng, shown[:COMMON] * example_often + shown[COMMON:] * example_seldom)
        example = f"{CWE_INSTRUCTION}{example}{CWE_QUESTION}\n{CWE_BEGUN} {listing(shown[:COMMON])}.\n\n\n"
        common, others, once = words[:COMMON], words[COMMON : COMMON + units], words[COMMON + units :]
        document = word_list(rng, [*common] * often + [*others] * seldom + once)
        return Draft(f"{example}{CWE_INSTRUCTION}{document}", CWE_QUESTION, tuple(common), CWE_BEGUN)

    return build


def coded_counts(words: int) -> list[int]:
    """How often the k-th most frequent word comes, k from 1, in a text of about so many words."""
    counts: list[int] = []
    while (count := round(words * (len(counts) + 1) ** -ALPHA / ZETA)) >= 1:
        counts.append(count)
    return counts


def frequent_words(seed: str) -> Build:
    """A unit is a drawn word; padding is dots. The most frequent word is shown as dots; the next three are asked."""

    def build(units: int, padding: int) -> Draft:
        rng = random.Random(seed)
        counts = coded_counts(units + 80)
        words: list[str] = []
        while len(words) < len(counts):
            word = "".join(rng.choices(string.ascii_lowercase, k=6))
            if word not in words:
                words.append(word)
        entries = [DOTS] * (counts[0] + padding)
        entries += [word for word, count in zip(words[1:], counts[1:], strict=True) for _ in range(count)]
        rng.shuffle(entries)
        return Draft(FWE_INSTRUCTION + " ".join(entries), FWE_QUESTION, tuple(words[1:4]), FWE_BEGUN)

    return build
