"""From rows to cells: one for every variant, suite, task and length. What a report is made of, small enough to keep."""

from __future__ import annotations

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.evaluation.store import OK, Key, Row, read
from benchmarks.evaluation.suites.ruler import TASKS
from benchmarks.quality.arithmetic import rounded


@dataclass(frozen=True)
class Cell:
    """One variant's answers to one task at one length.

    Attributes:
        statuses: how many rows have which; only `ok` ones are in the figures.
        error: standard error of the score, over samples; None of a single one.
        kept: share of the prompt's tokens; None where the server doesn't tell.
        depths: score by depth, in percent.
        measures: means of what the suite measures beside the score; medians of seconds.
    """

    variant: str
    suite: str
    task: str
    length: int
    statuses: dict[str, int]
    score: float | None = None
    error: float | None = None
    kept: float | None = None
    bytes_held: float | None = None
    depths: dict[str, float] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        return sum(number for status, number in self.statuses.items() if status != OK)


@dataclass(frozen=True)
class Summary:
    """
    Attributes:
        runs: what is said about each folder.
        variants: by name, in their order: group, method, budget, question, fields.
        failures: what went wrong how often, the most frequent first.
    """

    runs: list[dict[str, Any]]
    variants: dict[str, dict[str, Any]]
    cells: list[Cell]
    failures: list[dict[str, Any]]

    def cell(self, variant: str, suite: str, task: str, length: int) -> Cell | None:
        return self._index.get((variant, suite, task, length))

    @property
    def _index(self) -> dict[tuple[str, str, str, int], Cell]:
        if "index" not in self.__dict__:
            self.__dict__["index"] = {(c.variant, c.suite, c.task, c.length): c for c in self.cells}
        index: dict[tuple[str, str, str, int], Cell] = self.__dict__["index"]
        return index

    def of(self, suite: str, variant: str | None = None, length: int | None = None) -> list[Cell]:
        return [
            cell
            for cell in self.cells
            if cell.suite == suite and variant in (None, cell.variant) and length in (None, cell.length)
        ]

    def lengths(self, suite: str) -> list[int]:
        return sorted({cell.length for cell in self.of(suite)})

    def as_json(self) -> str:
        content = {
            "runs": self.runs, "variants": self.variants, "failures": self.failures,
            "cells": [{k: v for k, v in rounded(asdict(cell)).items() if v not in (None, {})} for cell in self.cells],
        }  # fmt: skip
        lines = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        return lines.replace('},{"variant"', '},\n{"variant"') + "\n"


def mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, from the sample's spread."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def make_cell(rows: Sequence[Row]) -> Cell:
    """Of rows of one place but for seed and index."""
    first, good = rows[0], [row for row in rows if row.status == OK]
    depths: dict[str, list[float]] = defaultdict(list)
    for row in good:
        if "depth" in row.info and row.score is not None:
            depths[f"{100 * row.info['depth']:.0f}"].append(row.score)
    names = dict.fromkeys(name for row in good for name in row.measures)
    measures = {}
    for name in names:
        values = [row.measures[name] for row in good if name in row.measures]
        measures[name] = statistics.median(values) if name in ("ttft", "tpot") else statistics.fmean(values)
    scores = [row.score for row in good if row.score is not None]
    return Cell(
        first.variant, first.suite, first.task, first.length, dict(Counter(row.status for row in rows)),
        mean(scores), standard_error(scores), mean(row.kept for row in good), mean(row.bytes_held for row in good),
        {depth: statistics.fmean(values) for depth, values in depths.items()}, measures,
    )  # fmt: skip


def _task_order(cell: Cell) -> tuple[Any, ...]:
    """RULER's tasks as RULER lists them; others by name."""
    known = TASKS.index(cell.task) if cell.task in TASKS else len(TASKS)
    return cell.suite != "ruler", cell.suite, cell.length, known, cell.task


def summarise(runs: Sequence[Mapping[str, Any]], rows: Iterable[Row]) -> Summary:
    """
    Args:
        runs: the folders' `run.json`.

    Raises:
        ValueError: folders of different models, or a variant that differs between them.
    """
    variants: dict[str, dict[str, Any]] = {}
    for about in runs:
        for name, words in about["variants"].items():
            if variants.setdefault(name, words) != words:
                raise ValueError(f"the folders differ in what {name!r} is")
    if len({about["model"] for about in runs}) > 1:
        raise ValueError(f"these are runs of different models: {', '.join(sorted({a['model'] for a in runs}))}")
    groups: dict[tuple[str, str, int, str], list[Row]] = defaultdict(list)
    problems: Counter[tuple[str, str, str, str]] = Counter()
    for row in rows:
        groups[row.suite, row.task, row.length, row.variant].append(row)
        if row.status != OK:
            problems[row.variant, row.suite, row.status, row.error or ""] += 1
    order = list(variants)
    cells = sorted(map(make_cell, groups.values()), key=lambda cell: (order.index(cell.variant), *_task_order(cell)))
    failures = [
        {"variant": variant, "suite": suite, "status": status, "error": error, "rows": number}
        for (variant, suite, status, error), number in problems.most_common()
    ]
    abouts = [{name: value for name, value in about.items() if name != "variants"} for about in runs]
    return Summary(abouts, variants, cells, failures)


def of_folders(folders: Sequence[Path]) -> Summary:
    """Rows that two folders hold are taken from the first.

    Raises:
        ValueError: a folder holds no results, or they don't go together.
    """
    runs: list[dict[str, Any]] = []
    rows: dict[Key, Row] = {}
    for folder in folders:
        if not (folder / "run.json").exists():
            raise ValueError(f"{folder} holds no results")
        runs.append(json.loads((folder / "run.json").read_text(encoding="utf-8")))
        for row in read(folder):
            rows.setdefault(row.key, row)
    return summarise(runs, rows.values())


def _summary(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: it isn't one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict) or not {"runs", "variants", "cells", "failures"} <= content.keys():
        raise ValueError(f"{path} is no summary.json of `longreach eval report`")
    return content


def of_files(paths: Sequence[Path]) -> Summary:
    """Summaries as they were written, put together; what two of them hold is taken from the first.

    Raises:
        ValueError: they don't go together.
    """
    parts = [_summary(path) for path in paths]
    merged = summarise([{**run, "variants": part["variants"]} for part in parts for run in part["runs"]], [])
    cells: dict[tuple[str, str, str, int], Cell] = {}
    for entry in (entry for part in parts for entry in part["cells"]):
        cell = Cell(**entry)
        cells.setdefault((cell.variant, cell.suite, cell.task, cell.length), cell)
    failures = [failure for part in parts for failure in part["failures"]]
    return Summary(merged.runs, merged.variants, list(cells.values()), failures)
