"""Pictures of a summary. They need matplotlib, which the extra `explain` brings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.loadtest.profiles import Prompts, parse
from benchmarks.loadtest.summary import TOO_FEW, Comparison, Group, Row, Summary, comparisons, first_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREY = "#7d8794"
COLOURS = ("#2f6fde", "#d9822b", "#2a9d6f", "#b0459b", "#c0392b", "#6b5bd2", "#4aa3c7", "#8a6d3b")
SHOWN = 4.0
"""Powers of two that the crossover's colours tell apart."""


def colours(summary: Summary) -> dict[str, str]:
    """By system; the baseline is grey."""
    others = [name for name in summary.systems if name != summary.baseline]
    named = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(others)}
    return named if summary.baseline is None else {summary.baseline: GREY, **named}


def _tidy(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def by_rate(summary: Summary, group: Group) -> Figure | None:
    """Goodput, latencies and what fills the cache, by arrival rate. None without a finite rate."""
    from matplotlib.figure import Figure

    rates = [rate for rate in group.rates if not math.isinf(rate)]
    if not rates:
        return None
    figure = Figure(figsize=(12.5, 7.0), layout="constrained")
    panels = figure.subplots(2, 3)
    goals = summary.goals
    _by_rate(summary, group, panels[0][0], lambda one: one.goodput, "good requests a second")
    panels[0][0].plot(rates, rates, color="black", linewidth=0.8, linestyle=":", label="all that arrive")
    panels[0][0].set_ylim(0, 1.06 * max(rates))
    _by_rate(summary, group, panels[0][1], lambda one: _first(one, 50), "first token, s: median, band to 90 %",
             upper=lambda one: _first(one, 90), goal=goals.ttft)  # fmt: skip
    _by_rate(summary, group, panels[0][2], lambda one: _scaled(one.percentile("tpot", "p50")),
             "per output token, ms: median, band to 90 %",
             upper=lambda one: _scaled(one.percentile("tpot", "p90")), goal=goals.tpot * 1e3)  # fmt: skip
    _by_rate(summary, group, panels[1][0], lambda one: one.watched("running"), "requests running at once, at most")
    _by_rate(summary, group, panels[1][1], lambda one: _scaled(one.watched("cache"), 100),
             "KV cache in use, %, at most")  # fmt: skip
    _by_rate(
        summary, group, panels[1][2], lambda one: one.cell.metrics.get("output_throughput"), "output tokens a second"
    )
    for axes in panels[1]:
        axes.set_xlabel("requests that arrive a second")
    for axes in panels.flat:
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=4, fontsize=9)
    figure.suptitle(group.title, fontsize=11, x=0.01, ha="left")
    return figure


def _first(one: Row, percentile: float) -> float | None:
    found = first_tokens(one.cell, percentile)
    return found.seconds if found else None


def _scaled(value: float | None, factor: float = 1e3) -> float | None:
    return None if value is None else value * factor


def _by_rate(
    summary: Summary, group: Group, axes: Any, figure: Callable[[Row], float | None], title: str,
    upper: Callable[[Row], float | None] | None = None, goal: float | None = None,
) -> None:  # fmt: skip
    """A line a system. Hollow markers: not all requests of that load were finished."""
    highest = 0.0
    for system, colour in colours(summary).items():
        rows = [one for one in group.of(system) if not math.isinf(one.rate) and figure(one) is not None]
        values = [figure(one) or 0.0 for one in rows]
        rates = [one.rate for one in rows]
        axes.plot(rates, values, color=colour, label=system, linewidth=1.6)
        for one, value in zip(rows, values, strict=True):
            whole = one.cell.count("done") == one.total
            axes.plot(
                one.rate, value, marker="o", markersize=6, color=colour, markerfacecolor=colour if whole else "white"
            )
        tops = [upper(one) for one in rows] if upper else []
        if tops and None not in tops:
            axes.fill_between(rates, values, tops, color=colour, alpha=0.13, linewidth=0)
        highest = max([highest, *values, *(top for top in tops if top is not None)])
    axes.set_ylim(0, 1.06 * highest or 1)
    if goal is not None and goal < 1.6 * highest:
        axes.set_ylim(0, 1.06 * max(goal, highest))
        axes.axhline(goal, color="#c0392b", linewidth=0.9, linestyle="--")
        axes.annotate("goal", (1.0, goal), xycoords=("axes fraction", "data"), fontsize=8, color="#c0392b",
                      ha="right", va="bottom")  # fmt: skip
    _tidy(axes, title)


def over_time(summary: Summary, group: Group) -> Figure | None:
    """Requests that run and wait, second by second, a panel a rate. None where servers have no metrics."""
    from matplotlib.figure import Figure

    rates = [rate for rate in group.rates if any(one.cell.watched["seconds"] for one in group.rows if one.rate == rate)]
    if not rates:
        return None
    figure = Figure(figsize=(12.5, 5.2), layout="constrained")
    panels = figure.subplots(2, len(rates), sharey="row", squeeze=False)
    for column, rate in enumerate(rates):
        for system, colour in colours(summary).items():
            one = group.at(system, rate)
            if one is None:
                continue
            watched = one.cell.watched
            panels[0][column].plot(watched["seconds"], watched["running"], color=colour, label=system)
            panels[0][column].plot(watched["seconds"], watched["waiting"], color=colour, linestyle=":", linewidth=1.1)
            panels[1][column].plot(watched["seconds"], [100 * share for share in watched["cache"]], color=colour)
        words = "all at once" if math.isinf(rate) else f"{rate:g} a second"
        _tidy(panels[0][column], f"{words}: running (dotted: waiting)")
        _tidy(panels[1][column], "KV cache in use, %")
        panels[1][column].set_xlabel("seconds")
        panels[1][column].set_ylim(0, 103)
    panels[0][0].set_ylim(bottom=0)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=4, fontsize=9)
    figure.suptitle(group.title, fontsize=11, x=0.01, ha="left")
    return figure


def crossover(summary: Summary) -> Figure | None:
    """Times the baseline's goodput, by what is asked and how fast: a panel a system. None without a baseline."""
    from matplotlib.figure import Figure

    found = {group.title: comparisons(summary, group) for group in summary.groups}
    systems = [
        name for name in summary.systems if any(one.other.system == name for all in found.values() for one in all)
    ]
    if not systems:
        return None
    rates = sorted({one.other.rate for all in found.values() for one in all})
    titles = [title for title, all in found.items() if all]
    width = 3.6 + len(systems) * (0.8 + 1.05 * len(rates))
    figure = Figure(figsize=(max(7.0, width), 1.7 + 0.62 * len(titles)), layout="constrained")
    panels = figure.subplots(1, len(systems), sharey=True, squeeze=False)[0]
    for axes, system in zip(panels, systems, strict=True):
        own = {
            (titles.index(title), rates.index(one.other.rate)): one
            for title, all in found.items() for one in all if one.other.system == system
        }  # fmt: skip
        _map(axes, own, len(titles), len(rates))
        axes.set_xticks(range(len(rates)), ["full load" if math.isinf(rate) else f"{rate:g}" for rate in rates])
        axes.set_yticks(range(len(titles)), [_wrapped(title) for title in titles], fontsize=8)
        axes.set_xlabel("requests that arrive a second")
        axes.set_title(system, fontsize=10)
    figure.suptitle(
        f"good requests a second, times {summary.baseline}'s (blue: it pays; in brackets: may be chance)", fontsize=10
    )
    return figure


def full_load(summary: Summary) -> Figure | None:
    """Times the baseline's finished requests a second when all come at once, by prompt and answer: a line a system, a
    panel a pool. None with fewer than two lengths of prompts, or of answers."""
    from matplotlib.figure import Figure

    found = [
        (profile, group.pool, one)
        for group in summary.groups
        if isinstance(profile := parse(group.profile), Prompts)
        for one in comparisons(summary, group)
        if math.isinf(one.other.rate)
    ]
    prompts = sorted({profile.prompt for profile, _, _ in found})
    outputs = sorted({profile.output for profile, _, _ in found})
    if len(prompts) < 2 and len(outputs) < 2:
        return None
    pools = sorted({pool or 0 for _, pool, _ in found})
    systems = list(dict.fromkeys(one.other.system for _, _, one in found))
    size = (2.4 + len(pools) * (0.9 + 0.95 * len(prompts)), 1.0 + len(systems) * (0.9 + 0.55 * len(outputs)))
    figure = Figure(figsize=(max(6.5, size[0]), size[1]), layout="constrained")
    panels = figure.subplots(len(systems), len(pools), sharex=True, sharey=True, squeeze=False)
    for line, column in [(line, column) for line in range(len(systems)) for column in range(len(pools))]:
        axes, system, pool = panels[line][column], systems[line], pools[column]
        own = {
            (outputs.index(profile.output), prompts.index(profile.prompt)): one
            for profile, its, one in found
            if one.other.system == system and (its or 0) == pool
        }
        _map(axes, own, len(outputs), len(prompts), upwards=True)
        axes.set_xticks(range(len(prompts)), [f"{prompt:,}" for prompt in prompts])
        axes.set_yticks(range(len(outputs)), [f"{output:,}" for output in outputs])
        tokens = next((one.other.pool for one in own.values() if one.other.pool), None)
        axes.set_title(f"{system}{f', pool of {tokens:,} tokens' if tokens else ''}", fontsize=10)
        if line == len(systems) - 1:
            axes.set_xlabel("prompt, tokens")
        if column == 0:
            axes.set_ylabel("answer, tokens")
    figure.suptitle(f"requests a second at full load, times {summary.baseline}'s (blue: it pays)", fontsize=10)
    return figure


def _wrapped(title: str) -> str:
    return title.replace("; ", "\n")


def _map(axes: Any, own: dict[tuple[int, int], Comparison], lines: int, columns: int, upwards: bool = False) -> None:
    import numpy as np

    powers = np.full((lines, columns), np.nan)
    for (y, x), one in own.items():
        ratio = one.ratio
        powers[y, x] = np.nan if ratio is None else SHOWN if math.isinf(ratio) else np.log2(max(ratio, 2**-SHOWN))
    axes.imshow(powers, cmap="RdBu", vmin=-SHOWN, vmax=SHOWN, aspect="auto", origin="lower" if upwards else "upper")
    axes.set_facecolor("#eef0f3")
    for (y, x), one in own.items():
        colour = "white" if abs(powers[y, x]) > 0.6 * SHOWN else "black"
        axes.text(x, y, _times(one), ha="center", va="center", fontsize=8.5, color=colour)


def _times(one: Comparison) -> str:
    """How many times, and the two figures; in brackets what may be chance."""
    both = f"{one.other.compared:.2f} : {one.base.compared:.2f}"
    if one.ratio is None:
        return "cut short" if one.cut else "none good"
    if math.isinf(one.ratio):
        return both
    times = f"{one.ratio:.2g}×" if one.ratio < 10 else f"{one.ratio:.0f}×"
    return f"({times})\n{both}" if one.verdict == TOO_FEW else f"{times}\n{both}"


def all_pictures(summary: Summary) -> Sequence[tuple[str, Figure]]:
    """Those that are files beside the page."""
    made = [("crossover.png", crossover(summary)), ("full-load.png", full_load(summary))]
    return [(name, figure) for name, figure in made if figure]
