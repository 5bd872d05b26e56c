"""Real text with a continuation: the Python language reference, which every CPython carries for `help()`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from typing import Any

CHARACTERS_PER_TOKEN = 8
"""More than any tokenizer needs for English prose, so that a piece of text this long is surely enough."""


@cache
def reference_text() -> str:
    """All help topics, by name: about 460,000 characters, the same for one Python version."""
    from pydoc_data.topics import topics

    return "\n\n\n".join(text.strip() for _, text in sorted(topics.items()))


@dataclass(frozen=True)
class Passage:
    """Token ids of a text: `document`, then `continuation` without a break."""

    document: list[int]
    continuation: list[int]


def make_passage(tokenizer: Any, tokens: int, continuation: int, seed: int, text: str | None = None) -> Passage:
    """A piece of a text that begins with a paragraph; document and continuation are `tokens` long together.

    Args:
        tokenizer: of transformers; its special tokens at the start (BOS) are counted and kept.
        text: the reference, if left out.

    Raises:
        ValueError: the text is too short for that.
    """
    text = reference_text() if text is None else text
    room = len(text) - tokens * CHARACTERS_PER_TOKEN
    if room <= 0 or not 0 < continuation < tokens:
        raise ValueError(f"no passage of {tokens} tokens with a continuation of {continuation}: the text is too short")
    start = text.index("\n\n", random.Random(f"passage/{seed}/{tokens}").randrange(room)) + 2
    piece = text[start : start + tokens * CHARACTERS_PER_TOKEN].lstrip()
    ids = tokenizer(piece, truncation=True, max_length=tokens)["input_ids"]
    if len(ids) < tokens:
        raise ValueError(f"no passage of {tokens} tokens: {len(ids)} found")
    return Passage(list(ids[: tokens - continuation]), list(ids[tokens - continuation :]))
