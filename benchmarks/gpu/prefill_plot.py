"""A picture of a results file's `benchmarks.gpu.prefill` runs: time to the first token as a share of stock vLLM's.

python -m benchmarks.gpu.prefill_plot benchmarks/results/DATE-prefill-h100.json docs/images/prefill-h100.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ["#2f6fde", "#5d9cec", "#16a085", "#c0392b", "#e57368", "#8e44ad", "#bb8fce", "#d68910", "#27ae60", "#7f8c8d",
           "#34495e", "#f1948a"]  # fmt: skip
Shares = dict[str, dict[int, float]]


def shares(results: dict[str, Any]) -> Shares:
    """By pattern and length of one prompt: seconds by stock vLLM's."""
    rows = [row for run in results["runs"] for row in run["rows"] if "ttft_s" in row and row.get("batch") == 1]
    stock = {row["prompt"]: row["ttft_s"] for row in rows if row["system"] == "stock"}
    found: Shares = {}
    for row in rows:
        if row["system"] != "stock":
            found.setdefault(row["pattern"], {})[row["prompt"]] = row["ttft_s"] / stock[row["prompt"]]
    return found


def draw(found: Shares, output: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 5), constrained_layout=True)
    for colour, (pattern, points) in zip(COLOURS * 2, found.items(), strict=False):
        lengths = sorted(points)
        style = "--" if pattern == "dense" else "-"
        axes.plot(lengths, [points[n] for n in lengths], style, marker="o", color=colour, label=pattern)
    axes.axhline(1.0, color="#9aa5b1", linewidth=1)
    lengths = sorted({length for points in found.values() for length in points})
    axes.set(
        xscale="log", ylim=(0, None), xlabel="tokens of the prompt", ylabel="time to the first token, stock vLLM = 1"
    )
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.legend(loc="lower left", fontsize=8, ncols=2)
    figure.savefig(output, dpi=110)


def main(argv: Sequence[str]) -> None:
    source, output = argv
    draw(shares(json.loads(Path(source).read_text(encoding="utf-8"))), Path(output))


if __name__ == "__main__":
    main(sys.argv[1:])
