"""Pictures of a results file of `benchmarks.gpu.claims` runs.

python -m benchmarks.gpu.plot benchmarks/results/DATE-cuda-h100.json docs/images/cuda-h100.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LABELS = {
    (True, False): "stock vLLM\nbf16 KV",
    (True, True): "stock vLLM\nfp8 KV",
    (False, False): "budget 2,048\nbf16 KV",
    (False, True): "budget 2,048\nfp8 KV",
}


def configurations(results: dict[str, Any]) -> dict[tuple[bool, bool], list[dict[str, Any]]]:
    """The rows of each claims run, by (stock, fp8)."""
    found = {}
    for run in results["runs"]:
        words = run["command"].split()
        if "benchmarks.gpu.claims" in words:
            found["stock" in words, "--fp8" in words] = run["rows"]
    return found


def main(source: Path, target: Path) -> None:
    results = json.loads(source.read_text())
    runs = configurations(results)
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
    figure.suptitle(f"8B Llama shapes, {results['device']}, {results['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
