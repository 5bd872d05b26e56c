"""Documents of an exact length: as much haystack as just fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.evaluation.tokens import Prompt, Prompter

CLOSE = 500
"""A prompt short of its length by less than one in so many tokens is long enough."""
TOLERANCE = 100
"""A prompt short of its length by more than one in so many tokens is an error."""


@dataclass(frozen=True)
class Draft:
    """A prompt's text (see `Prompter.prompt`) and what a right answer holds."""

    head: str
    tail: str
    answers: tuple[str, ...]
    begun: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)


Build = Callable[[int, int], Draft]
"""Makes the draft with so many units of haystack (sentences, words, paragraphs) and so much finer padding. Must be a
function of these two: random numbers are seeded inside."""


def largest(count: Callable[[int], int], room: int) -> int:
    """The largest n >= 0, or one that is nearly as good, with `count(n) <= room`; `count` grows with n.

    Interpolates between what was counted, since counting tokenizes a whole prompt.

    Raises:
        ValueError: not even 0 fits.
    """
    low, at_low = 0, count(0)
    if at_low > room:
        raise ValueError(f"{room} tokens are too few: the task alone takes {at_low}")
    high, at_high = 0, 0
    rate, tries, still = 8.0, 0, 0
    # A prompt that doesn't grow any more, whatever it is given, is as long as it gets.
    while (high == 0 or high - low > 1) and room - at_low > room // CLOSE and still < 4:
        tries += 1
        if high == 0:
            guess = low + max(1, round((room - at_low) / rate))
        elif tries % 3 == 0:
            guess = (low + high) // 2
        else:
            guess = low + round((room - at_low) * (high - low) / max(1, at_high - at_low))
        guess = max(low + 1, min(guess, high - 1)) if high else guess
        tokens = count(guess)
        if tokens > room:
            high, at_high = guess, tokens
        else:
            still = still + 1 if tokens == at_low else 0
            rate = max(0.5, (tokens - at_low) / (guess - low))
            low, at_low = guess, tokens
    return low


@dataclass(frozen=True)
class Fitted:
    """A draft, its prompt, and the sizes that it was built with."""

    draft: Draft
    prompt: Prompt
    units: int
    padding: int


def fit(prompter: Prompter, build: Build, room: int) -> Fitted:
    """The draft whose prompt has at most `room` tokens and at least 99 % of them.

    Raises:
        ValueError: there is none: too few tokens, or too little haystack.
    """

    def prompt(units: int, padding: int) -> Prompt:
        draft = build(units, padding)
        return prompter.prompt(draft.head, draft.tail, draft.begun)

    units = largest(lambda n: len(prompt(n, 0).ids), room)
    padding = largest(lambda n: len(prompt(units, n).ids), room)
    draft = build(units, padding)
    fitted = prompter.prompt(draft.head, draft.tail, draft.begun)
    if not room - room // TOLERANCE <= len(fitted.ids) <= room:
        raise ValueError(f"no prompt of {room} tokens within 1 %: {len(fitted.ids)}")
    return Fitted(draft, fitted, units, padding)
