"""Documents with several pass keys of different people, one of which is asked for: what is kept must be sorted, too."""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.quality.passkeys import (
    NAMES,
    NEEDLE,
    QUESTION,
    SENTENCES_PER_PARAGRAPH,
    SMALLEST,
    Passkey,
    Tokenizer,
    count,
    filler,
    render,
)

INTRO = "There are several important pass keys hidden in the text below. Find them and remember them."


def assemble(sentences: Sequence[str], needles: Sequence[str]) -> str:
    """The introduction, then paragraphs with the needles spread evenly among the sentences."""
    lines = list(sentences)
    for number, needle in reversed(list(enumerate(needles, 1))):
        lines.insert(round(len(sentences) * number / (len(needles) + 1)), needle)
    step = SENTENCES_PER_PARAGRAPH
    return "\n\n".join([INTRO, *(" ".join(lines[i : i + step]) for i in range(0, len(lines), step))])


def make_multikey(tokenizer: Tokenizer, tokens: int, keys: int, seed: int) -> Passkey:
    """A document with `keys` keys; its whole prompt has at most `tokens` tokens, and at most 40 fewer.

    `needle` and `depth` are those of the key that is asked for.

    Raises:
        ValueError: too few tokens, or more keys than names.
    """
    if tokens < SMALLEST + 40 * keys or not 1 <= keys <= len(NAMES):
        raise ValueError(f"no document of {tokens} tokens with {keys} keys")
    rng = random.Random(f"multikey/{seed}/{tokens}/{keys}")
    names = rng.sample(NAMES, keys)
    numbers = [str(number) for number in rng.sample(range(10_000, 100_000), keys)]
    needles = [NEEDLE.format(name=name, key=number) for name, number in zip(names, numbers, strict=True)]
    asked = rng.randrange(keys)
    question = QUESTION.format(name=names[asked])

    def length(sentences: Sequence[str]) -> int:
        return count(tokenizer, render(tokenizer, f"{assemble(sentences, needles)}\n\n{question}"))

    sentences: list[str] = []
    room = tokens - length(sentences)
    while room > 0:
        sentences.append(filler(rng))
        room -= count(tokenizer, " " + sentences[-1])
    while length(sentences) > tokens:
        sentences.pop()
    depth = (asked + 1) / (keys + 1)
    return Passkey(
        assemble(sentences, needles), question, numbers[asked], depth, seed, length(sentences), needles[asked]
    )  # fmt: skip
