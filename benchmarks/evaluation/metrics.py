"""RULER's metrics."""

from __future__ import annotations

import re
from collections.abc import Sequence


def cleaned(answer: str) -> str:
    """Without control characters, in lower case."""
    return re.sub(r"[\x00-\x1f]", "\n", answer).strip().lower()


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that stand in the answer, whatever the case."""
    text = cleaned(answer)
    return sum(reference.lower() in text for reference in references) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """1 if any reference stands in the answer, whatever the case."""
    text = cleaned(answer)
    return float(any(reference.lower() in text for reference in references))
