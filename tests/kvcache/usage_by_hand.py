"""What LRA, LFA, RaaS and H2O keep of a growing answer, one query after the other, without the code under test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.kvcache.brute_force import clear_cut, softmax

Matrix = Sequence[Sequence[float]]


@dataclass
class Head:
    """One KV head of one layer.

    Attributes:
        queries: [group][n][d], of the query heads that share it; keys: [n][d].
        kind: lra, lfa, raas or h2o.
        top, page, alpha: arguments of those that have them.
        held: positions of the tokens that are there, ascending.
        known: by position, how each token was used: times, counts or sums; by page in RaaS.
    """

    queries: Sequence[Matrix]
    keys: Matrix
    scale: float
    kind: str
    top: int = 0
    page: int = 0
    alpha: float = 0.0
    held: list[int] = field(default_factory=list)
    known: dict[int, float] = field(default_factory=dict)

    def come(self, position: int) -> None:
        """A token is there now, not used yet."""
        self.held.append(position)
        came = 0.0 if self.kind in ("lfa", "h2o") else float(position)
        self.known[self._key(position)] = max(came, self.known.get(self._key(position), came))

    def ask(self, position: int) -> None:
        """The query of this position looks at what was there with it; its own token has come."""
        seen = [token for token in self.held if token <= position]
        rows = []
        for head in self.queries:
            logits = [self.scale * sum(a * b for a, b in zip(head[position], self.keys[t], strict=True)) for t in seen]
            rows.append(softmax(logits))
        given = dict(zip(seen, [sum(at) / len(rows) for at in zip(*rows, strict=True)], strict=True))
        if self.kind == "h2o":
            for token, share in given.items():
                self.known[token] += share
        elif self.kind == "raas":
            mass: dict[int, float] = {}
            for token, share in given.items():
                mass[token // self.page] = mass.get(token // self.page, 0.0) + share
            for page, share in mass.items():
                assert abs(share - self.alpha) > 1e-7 or not self.alpha, "rounding decides here: choose another seed"
                if share > self.alpha:
                    self.known[page] = max(self.known[page], float(position))
        else:
            order = sorted(seen, key=lambda token: -given[token])
            clear_cut([given[token] for token in order], self.top)
            for token in order[: self.top]:
                self.known[token] = float(position) if self.kind == "lra" else self.known[token] + 1

    def value(self, position: int) -> float:
        """What is known of a token."""
        return self.known[self._key(position)]

    def evict(self, below: int, count: int, pinned: int, recent_from: int) -> list[int]:
        """Keep `count` of the tokens below a position; later ones stay too, uncounted.

        Returns:
            What was kept of them, ascending.
        """

        def rank(position: int) -> tuple[float, int]:
            """Of equal ones the older go first; sums are never equal, but for rounding, which must not decide."""
            if position < pinned or position >= recent_from:
                return math.inf, position
            return self.value(position), position

        competing = sorted((position for position in self.held if position < below), key=rank, reverse=True)
        if self.kind == "h2o":
            clear_cut([rank(position)[0] for position in competing], count)
        kept = sorted(competing[:count])
        self.held = kept + [position for position in self.held if position >= below]
        return kept

    def _key(self, position: int) -> int:
        return position // self.page if self.kind == "raas" else position
