"""A picture of a results file's `benchmarks.gpu.reading` and `benchmarks.gpu.selector_steps` runs.

python -m benchmarks.gpu.selector_plot benchmarks/results/DATE-selectors-h100.json docs/images/selectors-h100.png

Of what several runs of one script have, the last run's row counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TOKENS, CONTEXT = 2048, 126_000
KINDS = {"recycled": "mean over a stride of 50", "local": "all near"}
"""What a bar of a selector with several kinds of steps shows."""
COLOURS = {
    "recycled": "#2f6fde", "tidal": "#27ae60", "quest": "#c0392b", "lessismore": "#8e44ad", "loki": "#d68910",
    "local": "#16a085", "dense": "#5d6d7e", "stock vLLM": "#9aa5b1",
}  # fmt: skip
Row = dict[str, Any]


def rows_of(results: dict[str, Any], script: str) -> Iterator[Row]:
    for run in results["runs"]:
        if f"benchmarks.gpu.{script}" in run["command"].split():
            yield from run["rows"]


def faster(results: dict[str, Any]) -> dict[int, dict[str, float]]:
    """By requests at once: each selector's time against dense attention's, at `TOKENS` of `CONTEXT`."""
    found: dict[int, dict[str, float]] = {}
    dense: dict[int, float] = {}
    for row in rows_of(results, "reading"):
        name, batch = row["selector"], row["batch"]
        if row["context"] != CONTEXT:
            continue
        if name == "dense":
            dense[batch] = row["ms"]
        elif row["tokens"] == TOKENS and row["kind"] == KINDS.get(name, ""):
            found.setdefault(batch, {})[name] = dense[batch] / row["ms"]
    return found


def whole_steps(results: dict[str, Any]) -> dict[tuple[int, int], dict[str, float]]:
    """By prompt and requests at once: milliseconds of a step, stock vLLM's first."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for row in rows_of(results, "selector_steps"):
        if "ms_a_step" in row:
            name = "stock vLLM" if row["system"] == "stock" else row["selector"]
            found.setdefault((row["prompt"], row["batch"]), {})[name] = row["ms_a_step"]
    return found


def grouped(axes: Any, groups: Sequence[str], values: Sequence[dict[str, float]], names: Sequence[str]) -> None:
    """A bar for each name in each group that has it."""
    width = 0.84 / len(names)
    for index, name in enumerate(names):
        at = [place + (index - (len(names) - 1) / 2) * width for place, own in enumerate(values) if name in own]
        bars = axes.bar(at, [own[name] for own in values if name in own], width, color=COLOURS.get(name), label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=6.5)
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw(results: dict[str, Any]) -> Any:
    reading, steps = faster(results), whole_steps(results)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.2), width_ratios=[1, 1.5])
    groups = [f"{CONTEXT // 1000}k x {batch}" for batch in reading]
    grouped(left, groups, list(reading.values()), list(dict.fromkeys(name for own in reading.values() for name in own)))
    left.axhline(1, color="black", linewidth=0.6)
    left.set_title(f"attention of all layers: times faster than dense, K = {TOKENS:,}", fontsize=10)
    groups = [f"{prompt // 1000}k x {batch}" for prompt, batch in steps]
    grouped(right, groups, list(steps.values()), list(dict.fromkeys(name for own in steps.values() for name in own)))
    right.set_title(f"whole decode step, ms, K = {TOKENS:,}", fontsize=10)
    for axes in (left, right):
        axes.legend(fontsize=8)
    return figure


def main(source: Path, target: Path) -> None:
    results = json.loads(source.read_text(encoding="utf-8"))
    figure = draw(results)
    figure.suptitle(f"8B Llama shapes, {results['device'].partition(',')[0]}, {results['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
