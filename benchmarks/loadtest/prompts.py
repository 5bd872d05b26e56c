"""Prompts of exactly so many tokens, the same for everybody who has the same seed.

A prompt is a row of pieces, and a piece is a label and a length. Pieces with one label begin alike, so prompts share
what a server's prefix cache is to find. Tokens are random, since neither prefill nor decoding is faster for sense.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

LOW, HIGH = 1000, 30_000
"""Token ids in between are ordinary ones in every vocabulary of 32,000 and more."""


@dataclass(frozen=True)
class Piece:
    label: str
    tokens: int


@dataclass(frozen=True)
class Turn:
    """One request: its prompt and how many tokens to answer."""

    pieces: tuple[Piece, ...]
    output: int

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)


@dataclass(frozen=True)
class Conversation:
    """Requests that follow each other: the next is sent `pause` seconds after the answer before it."""

    turns: tuple[Turn, ...]
    pause: float = 0.0


@dataclass(frozen=True)
class Writer:
    """Makes the tokens of pieces. `low` is the first token id that is used, `high` the first that isn't."""

    seed: int = 0
    low: int = LOW
    high: int = HIGH

    def ids(self, turn: Turn) -> list[int]:
        """The prompt's token ids."""
        return [token for piece in turn.pieces for token in self._piece(piece)]

    def _piece(self, piece: Piece) -> list[int]:
        # RandomState, because NumPy promises its numbers for all versions, and default_rng's for none.
        state = np.random.RandomState(zlib.crc32(f"{self.seed}/{piece.label}".encode()))
        return [int(token) for token in state.randint(self.low, self.high, piece.tokens)]
