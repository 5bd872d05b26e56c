"""The quality table's arithmetic: suffix lengths, divergences, scores. Knows no engine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

LEAST_REST = 1e-6
"""Probability that the tokens outside a top-K list have at least: what is left of a float32 sum is noise below it."""


def budget_words(text: str) -> int | str:
    """A budget as a request names it: `1/8` is "12.5%", `25%` stays, `512` is a number of tokens.

    Raises:
        ValueError: none of these.
    """
    if text.endswith("%"):
        share = Fraction(text[:-1]) / 100
    elif "/" in text:
        share = Fraction(text)
    else:
        return int(text)
    if not 0 < share <= 1:
        raise ValueError(f"a budget is a share of the prompt in (0, 1] or a number of tokens; got {text!r}")
    return f"{float(share * 100):g}%"


def tokens_after(offsets: Sequence[tuple[int, int]], end: int) -> int:
    """Tokens that begin at or behind character `end`; one that straddles it holds a part of what is before.

    Args:
        offsets: first and past-the-last character of each token, ascending.
    """
    return sum(first >= end for first, _ in offsets)


def divergence(dense: Mapping[Any, float], other: Mapping[Any, float]) -> float:
    """KL(dense || other) in nats over the tokens that both lists hold, those of `dense` alone, and the rest.

    Merging tokens into buckets can only lower a divergence, and tokens that `other` doesn't list are given the
    largest probability that they may have there. So this is a lower bound of the divergence over the whole vocabulary;
    the longer the lists, the closer.

    Args:
        dense, other: log probability by token (id or text), each distribution's most likely tokens and perhaps one
            more (the token that stands in the text).
    """
    total, rest, other_rest, alone, number = 0.0, 1.0, 1.0, 0.0, 0
    for token, log_p in dense.items():
        p = math.exp(log_p)
        rest -= p
        if token in other:
            total += p * (log_p - other[token])
            other_rest -= math.exp(other[token])
        else:
            alone, number = alone + p, number + 1
    rest, other_rest = max(rest, LEAST_REST), max(other_rest, LEAST_REST)
    # What isn't listed is at most as likely as the last one listed; the least may be the one from the text.
    ceiling = math.exp(sorted(other.values())[:2][-1]) * number
    share = min(ceiling, other_rest * alone / (alone + rest))
    if alone:
        total += alone * math.log(alone / share)
    return max(0.0, total + rest * math.log(rest / (other_rest - share)))


def compared(dense: Sequence[Any], other: Sequence[Any]) -> int:
    """Answer positions whose context is the same in both: up to and with the first at which they part."""
    for index, (a, b) in enumerate(zip(dense, other, strict=False)):
        if a != b:
            return index + 1
    return min(len(dense), len(other))


def mean_divergence(dense: Sequence[Mapping[Any, float]], other: Sequence[Mapping[Any, float]]) -> float:
    """Mean over positions, as many as both have.

    Raises:
        ValueError: there is none.
    """
    pairs = list(zip(dense, other, strict=False))
    if not pairs:
        raise ValueError("no position to compare")
    return statistics.fmean(divergence(a, b) for a, b in pairs)


def likelihood_score(dense_nll: float, nll: float) -> float:
    """Dense perplexity over this one, at most 1: how much of the prediction is left."""
    return min(1.0, math.exp(dense_nll - nll))


def mean_and_worst(scores: Mapping[str, float]) -> tuple[float, str, float]:
    """Mean over tasks, and the task with the lowest score with it; of equal ones the first.

    Raises:
        ValueError: no scores.
    """
    if not scores:
        raise ValueError("no scores")
    worst = min(scores, key=scores.__getitem__)
    return statistics.fmean(scores.values()), worst, scores[worst]


def rounded(value: Any) -> Any:
    """Floats to four digits, however deep: what a file needs."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: rounded(entry) for key, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list) else value
