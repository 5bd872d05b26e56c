"""Tables of a summary, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.loadtest.summary import (
    AtLeast,
    Group,
    Row,
    Summary,
    comparisons,
    crossover,
    first_tokens,
    statuses,
)

NOTHING = "–"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rate_text(rate: float) -> str:
    return "all at once" if math.isinf(rate) else f"{rate:g}"


def seconds(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def milliseconds(value: float | None) -> str:
    return NOTHING if value is None else f"{value * 1e3:.1f}" if value < 0.1 else f"{value * 1e3:.0f}"


def at_least(value: AtLeast | None) -> str:
    return NOTHING if value is None else f"{'over ' if value.more else ''}{seconds(value.seconds)}"


def number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:,.0f}"


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.0f} %"


def main_table(group: Group) -> str:
    """Who kept the goals, and by how much."""
    head = [
        "arrivals a second", "system", "good", "good/s", "finished/s", "first token, s: 50 %", "90 %",
        "per token, ms: 50 %", "90 %", "running at once", "cache in use", "preemptions",
    ]  # fmt: skip
    rows = [
        [
            rate_text(rate), one.system, f"{one.good} of {one.total}", f"{one.goodput:.3f}", f"{one.finished:.3f}",
            at_least(first_tokens(one.cell, 50)), at_least(first_tokens(one.cell, 90)),
            milliseconds(one.percentile("tpot", "p50")), milliseconds(one.percentile("tpot", "p90")),
            number(one.watched("running")), percent(one.watched("cache")), number(one.grown("preemptions")),
        ]
        for rate in group.rates
        for one in group.rows
        if one.rate == rate
    ]  # fmt: skip
    return table(head, rows)


def detail_table(group: Group) -> str:
    """vLLM's figures of finished requests."""
    names = ("p50", "p90", "p99")
    head = ["system", "arrivals a second", "done", "not done", "load took, s", "output tokens/s"]
    for title in ("TTFT, s", "TPOT, ms", "ITL, ms", "end to end, s"):
        head += [f"{title}: {name}" for name in names]
    head += ["prefix cache", "tokens kept", "in flight"]
    rows = []
    for one in group.rows:
        cells = [
            one.system, rate_text(one.rate), str(one.cell.count("done")), statuses(one.cell) or NOTHING,
            f"{one.cell.seconds:.0f}", number(one.cell.metrics.get("output_throughput")),
        ]  # fmt: skip
        for figure, show in (("ttft", seconds), ("tpot", milliseconds), ("itl", milliseconds), ("e2el", seconds)):
            cells += [show(one.percentile(figure, name)) for name in names]
        cells += [percent(one.prefix_hits), percent(_kept(one)), str(one.cell.most_in_flight)]
        rows.append(cells)
    return table(head, rows)


def _kept(one: Row) -> float | None:
    seen = one.grown("tokens_seen")
    return (one.grown("tokens_kept") or 0.0) / seen if seen else None


def crossover_table(summary: Summary) -> str:
    """For which load each system pays."""
    rows = [
        [
            group.words, number(one.other.pool), rate_text(one.other.rate), one.other.system,
            f"{one.base.compared:.3f}", f"{one.other.compared:.3f}",
            NOTHING if one.ratio is None else "∞" if math.isinf(one.ratio) else f"{one.ratio:.2f}", one.verdict,
        ]
        for group in summary.groups
        for one in comparisons(summary, group)
    ]  # fmt: skip
    head = ["profile", "pool, tokens", "arrivals a second", "system", f"{summary.baseline}", "system's", "times", ""]
    return table(head, rows) if rows else ""


def sentences(summary: Summary) -> list[str]:
    """What the crossover is, a line a system and profile."""
    told = []
    for group in summary.groups:
        found = comparisons(summary, group)
        for system in group.systems:
            own = [one for one in found if one.other.system == system]
            if own:
                told.append(f"{system} against {summary.baseline}, {group.title}: {crossover(own)}.")
    return told


def keeping_up(summary: Summary) -> str:
    """The highest rate that each system keeps up with, a line a group."""
    head = ["profile", "pool, tokens", *summary.systems]
    rows = []
    for group in summary.groups:
        kept = [group.keeps_up(system) if system in group.systems else math.nan for system in summary.systems]
        lowest = min(group.rates)
        texts = [
            NOTHING if rate is not None and math.isnan(rate) else f"under {lowest:g}" if rate is None else f"{rate:g}"
            for rate in kept
        ]
        pool = " / ".join(f"{size:,}" for size in sorted({one.pool for one in group.rows if one.pool}))
        rows.append([group.words, pool or NOTHING, *texts])
    return table(head, rows)
