"""The check of a request's `prefill_attention` field, and what is told of patterns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from attention_plugins.prefill.registry import DENSE, FIELD, make_pattern, pattern_words, patterns
from kvcache.method import PolicyError

_NEEDS = (
    ("needs_training", "a model that was trained with it"),
    ("needs_calibration", "tables of `longreach calibrate` to be at its best"),
)


def needs_of(described: Mapping[str, Any]) -> list[str]:
    """What a pattern needs, in words, from its own description."""
    return [text for name, text in _NEEDS if described[name]]


class PatternDesk:
    """What one running server accepts. Every pattern can be asked for: none costs anything while it isn't.

    Args:
        default: the server's own pattern, `{"pattern": name, ...}`.
        unavailable: None when patterns can run here, else why they can't.
    """

    field: ClassVar[str] = FIELD
    off: ClassVar[dict[str, Any]] = {"pattern": DENSE}

    def __init__(self, default: dict[str, Any] | None = None, unavailable: str | None = None) -> None:
        self.unavailable = unavailable
        self.default = self.check(default or self.off)

    def lacks(self, reason: str) -> None:
        """Refuse all patterns from now on.

        Raises:
            PolicyError: the server's own is one.
        """
        self.unavailable = reason
        self.check(self.default)

    def check(self, words: Any) -> dict[str, Any]:
        """The pattern a request gets, with every argument spelled out.

        Raises:
            PolicyError: names the field and what is allowed.
        """
        pattern = make_pattern(words)
        if pattern is None:
            return pattern_words(None)
        if self.unavailable:
            raise PolicyError(f"{FIELD}.pattern", f"{pattern.name} is not available: {self.unavailable}.", DENSE)
        return pattern_words(pattern)

    def describe(self) -> dict[str, Any]:
        """The answer of `GET /v1/prefill/patterns`."""
        return {
            "object": "list",
            "default": self.default,
            "available": self.unavailable is None,
            "unavailable_reason": self.unavailable,
            "data": [
                {
                    "name": DENSE,
                    "title": "Attend to everything: stock vLLM",
                    "paper": "none",
                    "arguments": {"type": "object", "properties": {}, "additionalProperties": False},
                },
                *(pattern.describe() for pattern in patterns().values()),
            ],
        }
