"""Figures of each load, and how systems compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.loadtest.profiles import parse
from benchmarks.loadtest.records import DONE, FAILED, NOT_SENT, UNFINISHED, Goals, Record
from benchmarks.loadtest.store import Cell, Results

PAYS, COSTS = 1.05, 0.95
"""Times the baseline's figure: from here on compression pays, and from here down it costs."""
TOO_FEW = "too few requests to tell"
CHANCE = 2.0
"""Standard deviations that two counts of good requests have to be apart to differ (McNemar's test)."""
KEEPS_UP = 0.9
"""Share of requests that have to be good for a system to keep up with a rate."""


@dataclass(frozen=True)
class AtLeast:
    """Seconds; `more`: of a request that still waited when its time was up, so really it is longer."""

    seconds: float
    more: bool = False


def first_tokens(cell: Cell, percentile: float) -> AtLeast | None:
    """A percentile of the time to first token over all requests that were sent, also those that still waited for it.

    Figures of finished requests alone look better the worse a system is overloaded.
    """
    sent = [request for request in cell.requests if request.status in (DONE, UNFINISHED)]
    waits = sorted((_wait(request, cell.seconds), request.ttft is None) for request in sent)
    if not waits:
        return None
    place = percentile / 100 * (len(waits) - 1)
    low, high = waits[math.floor(place)], waits[math.ceil(place)]
    return AtLeast(low[0] + (place - math.floor(place)) * (high[0] - low[0]), low[1] or high[1])


def could_be_good(cell: Cell, goals: Goals) -> int:
    """Unfinished requests that were ended before they had missed a goal: they aren't good, and it isn't known."""
    if math.isinf(cell.key.rate):
        return 0  # full loads aren't compared by goals
    return sum(
        request.status == UNFINISHED
        and (request.ttft is None or request.ttft <= goals.ttft)
        and cell.seconds - request.arrival < goals.ttft + (request.asked_output - 1) * goals.tpot
        for request in cell.requests
    )


def _wait(request: Record, end: float) -> float:
    return request.ttft if request.ttft is not None else max(0.0, end - request.arrival)


@dataclass(frozen=True)
class Row:
    """One load.

    Attributes:
        kept_goals: conversation and turn of the good requests; `goodput`: how many a second.
        finished: a second, good or not.
    """

    cell: Cell
    kept_goals: frozenset[tuple[int, int]]
    sent: int
    goodput: float
    finished: float

    @property
    def system(self) -> str:
        return self.cell.key.system

    @property
    def rate(self) -> float:
        return self.cell.key.rate

    @property
    def good(self) -> int:
        return len(self.kept_goals)

    @property
    def total(self) -> int:
        return len(self.cell.requests)

    @property
    def share(self) -> float:
        """Of all requests of the load, those that were good."""
        return self.good / self.total

    @property
    def compared(self) -> float:
        """What to compare by: goodput, or at full load (an infinite rate) what is finished."""
        return self.finished if math.isinf(self.rate) else self.goodput

    def percentile(self, figure: str, name: str) -> float | None:
        """Seconds, of vLLM's milliseconds: `ttft`, `tpot`, `itl` or `e2el`; of finished requests."""
        value = (self.cell.metrics.get(f"percentiles_{figure}_ms") or {}).get(name)
        return None if value is None else value / 1e3

    def watched(self, name: str) -> Any:
        """Largest sample of `running`, `waiting` or `cache`; None where nobody told."""
        return max(self.cell.watched[name], default=None)

    def grown(self, name: str) -> float | None:
        value: float | None = self.cell.watched["grown"].get(name)
        return value

    @property
    def pool(self) -> int | None:
        """The server's block pool in tokens."""
        tokens: int | None = self.cell.watched["pool_tokens"]
        return tokens

    @property
    def prefix_hits(self) -> float | None:
        """Share of the prompts' tokens that the prefix cache had."""
        queries = self.grown("prefix_queries")
        return (self.grown("prefix_hits") or 0.0) / queries if queries else None


def row(cell: Cell, goals: Goals) -> Row:
    good = frozenset((request.conversation, request.turn) for request in cell.requests if request.good(goals))
    sent = sum(request.status != NOT_SENT for request in cell.requests)
    return Row(cell, good, sent, len(good) / cell.seconds, cell.count(DONE) / cell.seconds)


@dataclass(frozen=True)
class Group:
    """All loads of one profile and pool."""

    profile: str
    pool: int | None
    rows: list[Row]

    @property
    def systems(self) -> list[str]:
        return list(dict.fromkeys(one.system for one in self.rows))

    def of(self, system: str) -> list[Row]:
        return [one for one in self.rows if one.system == system]

    def at(self, system: str, rate: float) -> Row | None:
        return next((one for one in self.rows if one.system == system and one.rate == rate), None)

    @property
    def rates(self) -> list[float]:
        return sorted({one.rate for one in self.rows})

    @property
    def title(self) -> str:
        """For headings."""
        sizes = sorted({one.pool for one in self.rows if one.pool})
        room = f"; pool of {' or '.join(f'{size:,}' for size in sizes)} tokens" if sizes else ""
        return f"{self.words}{room}"

    @property
    def words(self) -> str:
        return parse(self.profile).words

    def keeps_up(self, system: str) -> float | None:
        """The highest measured rate at which `KEEPS_UP` of the requests were good, and at all lower ones; or None."""
        kept = None
        for one in sorted(self.of(system), key=lambda one: one.rate):
            if math.isinf(one.rate) or one.share < KEEPS_UP:
                break
            kept = one.rate
        return kept


@dataclass(frozen=True)
class Summary:
    """Everything that a report tells."""

    about: dict[str, Any]
    goals: Goals
    groups: list[Group]
    baseline: str | None

    @property
    def rows(self) -> list[Row]:
        return [one for group in self.groups for one in group.rows]

    @property
    def systems(self) -> list[str]:
        return list(dict.fromkeys(one.system for one in self.rows))


def summarize(results: Results, baseline: str | None = None) -> Summary:
    """
    Args:
        baseline: a system. Left out, the first that compresses nothing, if there are others.

    Raises:
        ValueError: there is no such system.
    """
    identity = results.about["identity"]
    goals = Goals(identity["ttft_goal"], identity["tpot_goal"])
    groups: dict[tuple[str, int | None], list[Row]] = {}
    for cell in results.cells:
        groups.setdefault((cell.key.profile, cell.key.pool), []).append(row(cell, goals))
    made = [Group(profile, pool, rows) for (profile, pool), rows in groups.items()]
    names = list(dict.fromkeys(cell.key.system for cell in results.cells))
    if baseline is not None and baseline not in names:
        raise ValueError(f"--baseline {baseline}: there is {', '.join(names)}")
    plain = [cell.key.system for cell in results.cells if not cell.compresses]
    chosen = baseline or next(iter(plain), None)
    return Summary(results.about, goals, made, chosen if len(names) > 1 else None)


@dataclass(frozen=True)
class Comparison:
    """One load of a system beside the baseline's with the same requests and arrivals."""

    base: Row
    other: Row

    @property
    def ratio(self) -> float | None:
        """Times the baseline's goodput (at full load: finished requests a second). Infinite where it has none."""
        if self.cut:
            return None
        if self.base.compared:
            return self.other.compared / self.base.compared
        return math.inf if self.other.compared else None

    @property
    def cut(self) -> bool:
        """Whether full loads can't be compared: one was ended before all its requests."""
        return math.isinf(self.base.rate) and any(one.cell.count(DONE) < one.total for one in (self.base, self.other))

    @property
    def verdict(self) -> str:
        ratio = self.ratio
        if self.cut:
            return "cut short"
        if ratio is None:
            return "neither has a good request"
        if COSTS < ratio < PAYS:
            return "no difference"
        if not self.told_apart:
            return TOO_FEW
        return "pays" if ratio >= PAYS else "costs"

    @property
    def told_apart(self) -> bool:
        """Whether the difference is larger than chance: the same requests arrive at the same times, so those count that
        were good with one system and not with the other."""
        if math.isinf(self.base.rate):
            return True
        good = self.other.kept_goals, self.base.kept_goals
        only_other, only_base = len(good[0] - good[1]), len(good[1] - good[0])
        return abs(only_other - only_base) >= CHANCE * math.sqrt(only_other + only_base)


def comparisons(summary: Summary, group: Group) -> list[Comparison]:
    """Of one group, system by system and rate by rate; none without a baseline."""
    found = []
    for system in group.systems:
        for rate in group.rates:
            base = group.at(summary.baseline, rate) if summary.baseline else None
            other = group.at(system, rate)
            if system != summary.baseline and base and other and base.cell.key.requests == other.cell.key.requests:
                found.append(Comparison(base, other))
    return found


def statuses(cell: Cell) -> str:
    """What became of the requests that aren't done, in words."""
    told = [f"{cell.count(status)} {status}" for status in (UNFINISHED, FAILED, NOT_SENT) if cell.count(status)]
    return ", ".join(told)


def crossover(found: Sequence[Comparison]) -> str:
    """One sentence of one system's comparisons at several rates."""
    words = {"pays": "pays at", "no difference": "no difference to goodput at", "costs": "costs at",
             TOO_FEW: f"{TOO_FEW} at",
             "neither has a good request": "neither has a good request at",
             "cut short": "not known (a load was cut short) at"}  # fmt: skip
    parts = []
    for verdict, told in words.items():
        if own := [one for one in found if one.verdict == verdict]:
            parts.append(f"{told} {_rates(own)}")
    return "; ".join(parts)


def _rates(found: Sequence[Comparison]) -> str:
    finite = [f"{one.other.rate:g}" for one in found if not math.isinf(one.other.rate)]
    parts = [f"{', '.join(finite)} requests/s"] if finite else []
    return " and ".join(parts + ["full load"] * (len(finite) < len(found)))
