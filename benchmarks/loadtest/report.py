"""A report of results: one HTML file with everything in it, the crossover as a picture, and the results as one JSON."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from benchmarks.evaluation.plots import available, png
from benchmarks.loadtest import plots, tables
from benchmarks.loadtest.profiles import parse
from benchmarks.loadtest.store import MERGED, load
from benchmarks.loadtest.summary import KEEPS_UP, Summary, could_be_good, statuses, summarize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).parent / "report.html.jinja"
SHOWN_ERRORS = 5


@dataclass(frozen=True)
class Section:
    """A heading with text, a Markdown table, or a picture under it."""

    title: str
    text: str = ""
    lines: tuple[str, ...] = ()
    table: str = ""
    figure: Figure | None = None
    level: int = 2


def sections(summary: Summary) -> Iterator[Section]:
    """Everything a reader wants to know, what was found first."""
    pictures = available()
    if not pictures:
        yield Section("There are no pictures", "matplotlib isn't installed: install the extra `explain`, then "
                      "`longreach loadtest report DIR` draws them.")  # fmt: skip
    if problems := tuple(_problems(summary)):
        yield Section("Mind when reading", lines=problems)
    if summary.baseline:
        yield Section(
            "Crossover: when does it pay?",
            f"Goodput against {summary.baseline} with the same requests at the same times: it pays from 1.05 times on, "
            "and costs from 0.95 times down, where more requests differ than by chance (McNemar's test, two standard "
            "deviations). At full load (all at once), finished requests a second are compared.",
            tuple(tables.sentences(summary)), figure=plots.crossover(summary) if pictures else None,
        )  # fmt: skip
        if pictures and (figure := plots.full_load(summary)):
            yield Section("At full load, by prompt and answer", figure=figure, level=3)
        yield Section("Every comparison", table=tables.crossover_table(summary), level=3)
    if any(not math.isinf(rate) for group in summary.groups for rate in group.rates):
        yield Section(
            "Who keeps up with which rate",
            f"The highest measured arrival rate at which, and at all lower ones, {KEEPS_UP:.0%} of the requests were "
            f"good: first token within {summary.goals.ttft:g} s, and {summary.goals.tpot * 1e3:g} ms a token after it.",
            table=tables.keeping_up(summary),
        )  # fmt: skip
    for group in summary.groups:
        yield Section(
            f"Results: {group.title}",
            "Times to first token are of all requests that were sent; “over” marks one of a request that still waited "
            "when the load was ended. Times per token are of finished requests.",
            table=tables.main_table(group), figure=plots.by_rate(summary, group) if pictures else None,
        )  # fmt: skip
        if pictures and (figure := plots.over_time(summary, group)):
            yield Section("While it was loaded", figure=figure, level=3)
        yield Section("Standard figures of finished requests", "As vLLM's benchmark sums them up.",
                      table=tables.detail_table(group), level=3)  # fmt: skip


def _problems(summary: Summary) -> Iterator[str]:
    """What makes figures other than they look."""
    for one in summary.rows:
        key, cell = one.cell.key, one.cell
        rate = tables.rate_text(key.rate) + ("" if math.isinf(key.rate) else " a second")
        where = (
            f"{key.system}, {rate}, {parse(key.profile).words}{f', pool of {one.pool:,} tokens' if key.pool else ''}"
        )
        if told := statuses(cell):
            errors = list(dict.fromkeys(request.error for request in cell.requests if request.error))[:SHOWN_ERRORS]
            yield f"{where}: {told} of {one.total}.{' Errors: ' if errors else ''}{'; '.join(errors)}"
        if early := could_be_good(cell, summary.goals):
            yield (f"{where}: ended early, for want of time: {early} of the unfinished could still have been good. "
                   "Give more --seconds.")  # fmt: skip
        if cell.most_in_flight >= summary.about.get("concurrency", float("inf")):
            yield f"{where}: the load test's own limit of {cell.most_in_flight} requests in flight was reached."
    for text in summary.about.get("not_begun", ()):
        yield f"Not measured, for want of time: {text}."


def as_html(summary: Summary) -> str:
    """One page that needs nothing else."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    shown = [
        {
            "title": section.title, "text": section.text, "rows": _cells(section.table), "lines": section.lines,
            "level": section.level,
            "picture": base64.b64encode(png(section.figure)).decode() if section.figure else "",
        }
        for section in sections(summary)
    ]  # fmt: skip
    systems = {one.system: one.cell for one in summary.rows}
    return page.render(summary=summary, about=summary.about, sections=shown, systems=systems)


def _cells(table: str) -> list[list[str]]:
    """A Markdown table's cells, without the rule."""
    lines = [line.strip("|").split("|") for line in table.split("\n") if line]
    return [[cell.strip() for cell in line] for number, line in enumerate(lines) if number != 1]


def write_report(sources: Sequence[Path], baseline: str | None = None) -> str:
    """Write report.html, results.json and crossover.png into the first source (a folder, or where a results.json is).

    Returns:
        What they tell.

    Raises:
        ValueError: there are no results, or they don't compare.
    """
    results = load(sources)
    summary = summarize(results, baseline)
    out = sources[0] if sources[0].is_dir() else sources[0].parent
    results.write(out / MERGED)
    (out / "report.html").write_text(as_html(summary), encoding="utf-8")
    if available():
        for name, figure in plots.all_pictures(summary):
            (out / name).write_bytes(png(figure, dpi=130))
    told = [f"{group.title}\n\n{tables.main_table(group)}" for group in summary.groups]
    return "\n\n".join([*told, *tables.sentences(summary), *_problems(summary), str(out / "report.html")])
