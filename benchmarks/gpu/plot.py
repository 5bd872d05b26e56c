"""Pictures of results files: of their `benchmarks.gpu.arrivals` runs if there are any, else of `benchmarks.gpu.claims`.

python -m benchmarks.gpu.plot benchmarks/results/DATE-cuda-h100.json [LATER.json ...] docs/images/cuda-h100.png

Of a configuration's rates that several files have, the last file's count.
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

from benchmarks.gpu.arrivals import TPOT_LIMIT, TTFT_LIMIT

LABELS = {
    (True, False): "stock vLLM\nbf16 KV",
    (True, True): "stock vLLM\nfp8 KV",
    (False, False): "budget 2,048\nbf16 KV",
    (False, True): "budget 2,048\nfp8 KV",
}


Rows = dict[tuple[bool, bool], list[dict[str, Any]]]
"""Rows of all runs of a configuration, by (stock, fp8)."""


def configurations(results: dict[str, Any], script: str) -> Rows:
    found: Rows = {}
    for run in results["runs"]:
        words = run["command"].split()
        if f"benchmarks.gpu.{script}" in words:
            found.setdefault(("stock" in words, "--fp8" in words), []).extend(run["rows"])
    return found


def main(sources: Sequence[Path], target: Path) -> None:
    files = [json.loads(source.read_text()) for source in sources]
    results = files[-1] | {"runs": [run for file in files for run in file["runs"]]}
    if runs := configurations(results, "arrivals"):
        figure = draw_arrivals(runs)
    else:
        figure = draw_claims(configurations(results, "claims"))
    figure.suptitle(f"8B Llama shapes, {results['device'].partition(',')[0]}, {results['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def draw_arrivals(runs: Rows) -> Any:
    """Requests that kept both limits, and the medians that decide it, by the rate at which they arrive."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 4))
    titles = (
        ("good requests a second", None),
        ("time to first token, s: median", TTFT_LIMIT),
        ("time per output token, ms: median", TPOT_LIMIT * 1e3),
    )
    for panel, (title, limit) in zip(panels, titles, strict=True):
        if limit:
            panel.axhline(limit, color="#c0392b", linewidth=0.8, linestyle="--")
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("requests that arrive a second", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    for kind, marker in zip(LABELS, "osD^", strict=True):
        by_rate = {row["rate"]: row for row in runs.get(kind, ()) if "rate" in row and "so_far" not in row}
        if not by_rate:
            continue
        rates = sorted(by_rate)
        rows = [by_rate[rate] for rate in rates]
        values = (
            [row["goodput_s"] for row in rows],
            [row["ttft_s"]["50"] for row in rows],
            [row["tpot_ms"]["50"] for row in rows],
        )
        colour = "#9aa5b1" if kind[0] else "#2f6fde"
        for panel, numbers in zip(panels, values, strict=True):
            panel.plot(rates, numbers, marker=marker, color=colour, label=LABELS[kind].replace("\n", ", "))
    for panel in panels:
        panel.set_ylim(bottom=0)
        panel.set_xticks(sorted({row["rate"] for rows in runs.values() for row in rows if "rate" in row}))
    panels[0].legend(fontsize=8)
    return figure


def draw_claims(runs: Rows) -> Any:
    figure, (requests, throughput, latency) = plt.subplots(1, 3, figsize=(13, 4.2))
    kinds = [kind for kind in LABELS if kind in runs]
    longest = {
        kind: next(row for row in runs[kind] if row.get("prompt") == 32768 and "requests" in row) for kind in kinds
    }
    colours = ["#9aa5b1" if stock else "#2f6fde" for stock, _ in kinds]
    for axes, key, title in (
        (requests, "requests", "requests of 32k that decode at once"),
        (throughput, "decode_tokens_s", "decode tokens/s, all together"),
    ):
        bars = axes.bar([LABELS[kind] for kind in kinds], [longest[kind][key] for kind in kinds], color=colours)
        axes.bar_label(bars, fmt="{:,.0f}")
        axes.set_title(title, fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    rows = {
        stock: {(r["prompt"], r["batch"]): r for r in runs[stock, False] if "ttft_s" in r} for stock in (True, False)
    }
    shapes = list(rows[True])
    names = [f"{prompt // 1000}k x {batch}" for prompt, batch in shapes]
    for key, marker, label in (("ttft_s", "o", "time to first token"), ("tpot_ms", "s", "time per output token")):
        ratios = [100 * (rows[False][shape][key] / rows[True][shape][key] - 1) for shape in shapes]
        latency.plot(names, ratios, marker, label=label)
    latency.axhspan(-2, 2, color="#2f6fde", alpha=0.08)
    latency.axhline(0, color="black", linewidth=0.6)
    latency.set_ylim(-4, 4)
    latency.set_title("no policy: % over stock vLLM (band: 2 %)", fontsize=10)
    latency.tick_params(axis="x", labelsize=8)
    latency.legend(fontsize=8)
    latency.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main([Path(source) for source in sys.argv[1:-1]], Path(sys.argv[-1]))
