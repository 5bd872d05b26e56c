"""A report of results: one HTML file with everything in it, its tables as Markdown, and the summary as JSON."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from benchmarks.evaluation import plots, tables
from benchmarks.evaluation.standing import BELOW, GOOD, LEAST, standings
from benchmarks.evaluation.summary import Summary, of_folders

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).parent / "report.html.jinja"


@dataclass(frozen=True)
class Section:
    """A heading with text, a Markdown table, or a picture under it."""

    title: str
    text: str = ""
    table: str = ""
    figure: Figure | None = None


def sections(summary: Summary) -> Iterator[Section]:
    """Everything a reader wants to know, the shortest first."""
    suite = tables.main_suite(summary)
    if suite is None:
        yield Section("Nothing was scored", "No request has a score.")
        return
    pictures = plots.available()
    if not pictures:
        text = "matplotlib isn't installed: install the extra `explain`, then `longreach eval report` draws them."
        yield Section("There are no pictures", text)
    for length in reversed(summary.lengths(suite)):
        at = f"{suite}, {length:,} tokens"
        if len(standings(summary, suite, length)) < 2:
            continue  # only the dense model, whose tables come below
        if advice := _lines(tables.advice_table(summary, suite, length)):
            text = (
                f"Of the variants with at least {GOOD:.0%} of the dense mean, and {BELOW:.0%} of dense in each single "
            )
            yield Section(f"Which one: {at}", f"{text}task, the one that saves most.", advice)
        text = tables.left_out(summary, suite, length)
        yield Section(f"Results: {at}", text, tables.standing_table(summary, suite, length))
        if pictures and (figure := plots.by_budget(summary, suite, length)):
            yield Section(f"Score by budget: {at}", figure=figure)
        if pictures and (figure := plots.trade_offs(summary, suite, length)):
            text = "Full markers: the question was in the prompt. Named are those that no other one beats in both."
            yield Section(f"Cost and worth: {at}", text, figure=figure)
        yield Section(f"Each task: {at}", "In brackets: not compared.", tables.task_table(summary, suite, length))
    for name in ("needle", "passkey"):
        if pictures and (figure := plots.needle_maps(summary, name)):
            yield Section(f"Found by depth: {name}", figure=figure)
    for name in dict.fromkeys(cell.suite for cell in summary.cells):
        if summary.of(name)[0].score is not None or name == suite:
            text = f"Tasks under {LEAST:.0%} (in brackets) are left out of comparisons."
            yield Section(f"The dense model: {name}", text, tables.dense_table(summary, name))
    if summary.failures:
        text = "None of these is in a figure above, and none was rated as a wrong answer."
        yield Section("Requests without a result", text, tables.failure_table(summary))


def _lines(table: str) -> str:
    """The table, or nothing if it has no lines."""
    return table if table.count("\n") > 1 else ""


def as_markdown(summary: Summary) -> str:
    """All tables; pictures are in the page."""
    parts = [f"{tables.counts(summary)}.\n"]
    for section in sections(summary):
        if section.figure is None:
            parts.append("\n\n".join(filter(None, [f"## {section.title}", section.text, section.table])) + "\n")
    return "\n".join(parts)


def as_html(summary: Summary) -> str:
    """One page that needs nothing else."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cells"] = _cells
    environment.filters["shade"] = _shade
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    shown = [
        {
            "title": section.title, "text": section.text, "rows": _cells(section.table),
            "picture": base64.b64encode(plots.png(section.figure)).decode() if section.figure else "",
        }
        for section in sections(summary)
    ]  # fmt: skip
    return page.render(summary=summary, sections=shown, counts=tables.counts(summary), variants=summary.variants)


def _cells(table: str) -> list[list[str]]:
    """A Markdown table's cells, without the rule."""
    lines = [line.strip("|").split("|") for line in table.split("\n") if line]
    return [[cell.strip() for cell in line] for number, line in enumerate(lines) if number != 1]


def _shade(cell: str, title: str) -> str:
    """A background for a score in percent."""
    if not title.startswith(("Each task", "The dense model")) or not cell.strip("()").isdigit():
        return ""
    share = min(100, int(cell.strip("()")))
    return f"background:hsl({share * 1.2:.0f} 55% 86%)"


def write_report(folders: Sequence[Path]) -> str:
    """Write report.html, report.md and summary.json into the first folder; say what is in them.

    Raises:
        ValueError: the folders hold no results, or of different models.
    """
    summary = of_folders(folders)
    out = folders[0]
    (out / "summary.json").write_text(summary.as_json(), encoding="utf-8")
    markdown = as_markdown(summary)
    (out / "report.md").write_text(markdown, encoding="utf-8")
    (out / "report.html").write_text(as_html(summary), encoding="utf-8")
    suite = tables.main_suite(summary)
    shown = [tables.standing_table(summary, suite, length) for length in summary.lengths(suite)] if suite else []
    told: list[Any] = [*shown, tables.counts(summary)]
    told += [f"{f['rows']} {f['status']}: {f['variant']}: {f['error']}" for f in summary.failures[:10]]
    return "\n\n".join([*map(str, told), f"{out / 'report.html'}"])
