"""For which prompts, answers and pool sizes compression pays: a model of full load from measured costs, as a picture.

python -m benchmarks.gpu.crossover benchmarks/results/DATE-cuda-h100.json docs/images/crossover.png

Not a measurement: it takes prefill, decode-step and compaction times from the results file and asks how many requests a
second one engine finishes when it always has work. In each step the engine decodes for all requests that fit, and
every request's prefill takes its time from them. Where a ratio is under 1, compression costs more than it brings.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

BUDGET, MAX_REQUESTS = 2048, 256
PROMPTS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
OUTPUTS = (64, 128, 256, 512, 1024, 2048, 4096)
POOLS = (110_000, 220_000, 440_000)


@dataclass(frozen=True)
class Costs:
    """Fits to measured rows; seconds.

    Attributes:
        prefill: coefficients of length^2 and length.
        step: seconds of a decode step without requests, for each request, and for each cached token that it reads.
        compaction: seconds for each prompt token.
    """

    prefill: np.ndarray
    step: np.ndarray
    compaction: float

    @classmethod
    def fit(cls, results: dict[str, Any]) -> Costs:
        rows = [row for run in results["runs"] for row in run.get("rows", ())]
        stock = next(run["rows"] for run in results["runs"] if run["command"].endswith("claims stock"))
        alone = [(row["prompt"], row["ttft_s"]) for row in stock if row.get("batch") == 1]
        lengths, seconds = np.array(alone).T
        prefill = np.linalg.lstsq(np.stack([lengths**2, lengths], 1), seconds, rcond=None)[0]
        steps = [(row["batch"], row["batch"] * row["prompt"], row["tpot_ms"]) for row in stock if "tpot_ms" in row]
        steps += [
            (row["requests"], row["requests"] * row["prompt"], row["decode_step_ms"])
            for row in stock if "decode_step_ms" in row
        ]  # fmt: skip
        batch, cached, ms = np.array(steps, dtype=float).T
        step = np.linalg.lstsq(np.stack([np.ones_like(batch), batch, cached], 1), ms / 1e3, rcond=None)[0]
        compactions = [
            row for row in rows if row.get("policy") == "snapkv" and "compaction_ms" in row and not row["fp8"]
        ]
        longest = max(compactions, key=lambda row: row["prompt"])
        return cls(prefill, step, longest["compaction_ms"] / 1e3 / longest["prompt"])

    def prefill_s(self, prompt: int) -> float:
        return float(self.prefill @ [prompt**2, prompt])

    def requests_s(self, prompt: int, output: int, pool: int, budget: int | None) -> float:
        """Requests finished a second under full load, or NaN where not even one fits."""
        if prompt + output > pool:
            return float("nan")
        kept = prompt if budget is None else min(prompt, budget)
        # A prompt and its copy are in memory together until it is compacted.
        room = pool if budget is None or kept == prompt else pool - prompt
        together = max(1, min(MAX_REQUESTS, room // (kept + output)))
        step = float(self.step @ [1, together, together * (kept + output / 2)])
        compaction = self.compaction * prompt if kept < prompt else 0.0
        return 1 / (self.prefill_s(prompt) + compaction + output * step / together)


def main(source: Path, target: Path) -> None:
    costs = Costs.fit(json.loads(source.read_text()))
    figure, axes = plt.subplots(1, len(POOLS), figsize=(4.6 * len(POOLS), 4.4), sharey=True)
    for panel, pool in zip(axes, POOLS, strict=True):
        ratio = np.array(
            [
                [costs.requests_s(n, m, pool, BUDGET) / costs.requests_s(n, m, pool, None) for n in PROMPTS]
                for m in OUTPUTS
            ]
        )
        panel.imshow(np.log2(ratio), cmap="RdBu", vmin=-4, vmax=4, origin="lower", aspect="auto")
        for y, x in np.ndindex(ratio.shape):
            text = "-" if np.isnan(ratio[y, x]) else f"{ratio[y, x]:.2f}" if ratio[y, x] < 10 else f"{ratio[y, x]:.0f}"
            panel.text(x, y, text, ha="center", va="center", fontsize=8)
        panel.set_xticks(range(len(PROMPTS)), [f"{n // 1024}k" for n in PROMPTS])
        panel.set_yticks(range(len(OUTPUTS)), [str(m) for m in OUTPUTS])
        panel.set_xlabel("prompt, tokens")
        panel.set_title(f"pool of {pool // 1000}k tokens", fontsize=10)
    axes[0].set_ylabel("answer, tokens")
    figure.suptitle(
        f"requests/s with snapkv at {BUDGET:,}, times stock vLLM's (model of full load, 8B on an H100)", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    prefill, step = costs.prefill, costs.step
    print(json.dumps({"prefill_s": list(prefill), "step_s": list(step), "compaction_s_per_token": costs.compaction}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
