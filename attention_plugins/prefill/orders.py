"""What a worker is told of a prompt that has a pattern, and what it tells of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attention_plugins.prefill.base import Pattern
from attention_plugins.prefill.grid import ROWS

PATTERNS = "prefill patterns"
"""Beside kinds of evidence, what workers may say they lack."""


@dataclass(frozen=True)
class StartPattern:
    """A request with a pattern starts (or starts again after preemption).

    Attributes:
        pattern: its words, `{"pattern": name, ...}`.
    """

    request_id: str
    pattern: dict[str, Any]
    prompt_len: int


@dataclass(frozen=True)
class PatternReport:
    """What a pattern made of a prompt, of the part that no prefix cache gave.

    Attributes:
        pattern: its name.
        tokens: queries that were attended.
        density: share of the prompt's attention that was computed, of the (block of queries, unit of keys) pairs with
            something to compute, by layer, mean over heads. Rows that a correction attends densely come on top of the
            plan's.
        pairs: how many such pairs a layer has.
    """

    request_id: str
    pattern: str
    tokens: int
    density: list[float]
    pairs: int


class PendingPatternReport:
    """A prompt whose work may still be running on a GPU."""

    def __init__(self, request_id: str, pattern: str, tokens: int, computed: torch.Tensor, pairs: int) -> None:
        """
        Args:
            computed: float32 [num_layers], pairs that were computed, mean over heads.
        """
        self._told = request_id, pattern, tokens
        self._pairs = pairs
        # Copied now, in order with the work itself, as `kvcache.orders.PendingReport` does.
        self._computed = torch.empty_like(computed, device="cpu", pin_memory=computed.is_cuda)
        self._computed.copy_(computed, non_blocking=True)
        self._done = torch.cuda.Event() if computed.is_cuda else None
        if self._done:
            self._done.record()

    def finish(self) -> PatternReport:
        """Wait for the work and tell what it did."""
        if self._done:
            self._done.synchronize()
        return PatternReport(*self._told, (self._computed / self._pairs).tolist(), self._pairs)


def applies(pattern: Pattern, num_layers: int, k_len: int) -> bool:
    """Whether a chunk that sees so many tokens is planned in some layer."""
    return any(pattern.applies(layer, k_len) for layer in range(num_layers))


def aligned(computed: int, tokens: int, stop: int, can_wait: bool) -> int:
    """How many tokens of a chunk to schedule: chunks end at multiples of 128 tokens, since blocks of queries are
    counted from a chunk's start; the last one ends where the prompt does, or what is attended of it.

    Args:
        computed: tokens before the chunk.
        tokens: most that it may have.
        stop: end of the prompt, or where it is compacted before that.
        can_wait: whether none is an answer where there is no room for a whole block of queries.
    """
    if computed >= stop or not tokens:
        return tokens
    end = min(computed + tokens, stop)
    if end < stop and (can_wait or end // ROWS * ROWS > computed):
        end = end // ROWS * ROWS
    return max(0, end - computed)
