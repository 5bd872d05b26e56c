"""What needles are hidden in: running text, or five sentences again and again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from benchmarks.quality.texts import reference_text

NOISE = (
    "The meadow lies in the sun.", "A cloud drifts over the hill.", "The brook runs on.", "Nothing happens here.",
    "Then it starts anew.",
)  # fmt: skip
"""RULER's repeated haystack in words of our own."""


def noise(sentences: int) -> list[str]:
    return [NOISE[index % len(NOISE)] for index in range(sentences)]


class Haystack:
    """A long running text: files of the user's, or else the language reference that every CPython carries.

    The reference differs a little between Python versions, so `digest` belongs to a result.
    """

    def __init__(self, files: Sequence[Path] = ()) -> None:
        """
        Raises:
            ValueError: a file can't be read, or they hold too little text.
        """
        try:
            self.text = "\n\n".join(file.read_text(encoding="utf-8") for file in files) if files else reference_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"haystack: {error}") from error
        if len(self.words) < 1000:
            raise ValueError(f"haystack: {len(self.words)} words are too few; 1,000 are needed")
        self.digest = hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @cached_property
    def words(self) -> list[str]:
        return self.text.split()

    @cached_property
    def starts(self) -> list[int]:
        """Numbers of the words that begin a sentence."""
        return [0, *(i + 1 for i, word in enumerate(self.words[:-1]) if word[-1] in ".!?")]

    @cached_property
    def vocabulary(self) -> list[str]:
        """Lower-case words of four to ten letters, each once, sorted."""
        return sorted(set(re.findall(r"(?<![\w'-])[a-z]{4,10}(?![\w'-])", self.text)))

    def sentences(self, words: int, place: float) -> list[str]:
        """So many words on from a sentence's start, as sentences; behind the text's end it begins again.

        Args:
            place: in [0, 1), of the start in the text.
        """
        first = self.starts[int(place * len(self.starts))]
        piece = [self.words[(first + i) % len(self.words)] for i in range(words)]
        return re.split(r"(?<=[.!?]) ", " ".join(piece)) if piece else []
