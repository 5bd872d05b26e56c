"""From rows to cells: means over documents, scores over tasks, a Markdown table and a picture."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.arithmetic import likelihood_score, mean_and_worst, rounded
from benchmarks.quality.measure import KNOWN, NONE, UNKNOWN, Row

SETTINGS = {KNOWN: "question known", UNKNOWN: "question unknown"}

ENOUGH = 0.75
"""What the dense model has to find of a task's keys for the task to tell something of policies."""


@dataclass(frozen=True)
class TaskScore:
    """One task over all documents. `score`: keys found, or the share of the dense likelihood that is left."""

    documents: int
    score: float
    kl: float
    perplexity: float | None = None


@dataclass(frozen=True)
class CellScore:
    """One policy at one budget in one setting. `kl`: mean over tasks. `tasks`: by name."""

    policy: str
    budget: str
    setting: str
    kept: float
    mean: float
    worst_task: str
    worst: float
    kl: float
    tasks: dict[str, TaskScore]


def task_score(rows: Sequence[Row]) -> TaskScore:
    """Mean over documents; perplexity is that of all their tokens."""
    kl = statistics.fmean(row.kl for row in rows)
    measured = [(row.nll, row.dense_nll) for row in rows if row.nll is not None and row.dense_nll is not None]
    if not measured:
        return TaskScore(len(rows), statistics.fmean(bool(row.found) for row in rows), kl)
    nll, dense = (statistics.fmean(values) for values in zip(*measured, strict=True))
    return TaskScore(len(rows), likelihood_score(dense, nll), kl, math.exp(nll))


def summarise(rows: Iterable[Row]) -> list[CellScore]:
    """Cells in the order of their first rows."""
    cells: dict[tuple[str, str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row.policy, row.budget, row.setting][row.task].append(row)
    found = []
    for (policy, budget, setting), by_task in cells.items():
        tasks = {task: task_score(own) for task, own in by_task.items()}
        mean, worst_task, worst = mean_and_worst({task: score.score for task, score in tasks.items()})
        kept = statistics.fmean(row.kept for own in by_task.values() for row in own)
        kl = statistics.fmean(score.kl for score in tasks.values())
        found.append(CellScore(policy, budget, setting, kept, mean, worst_task, worst, kl, tasks))
    return found


def doubts(cells: Sequence[CellScore]) -> list[str]:
    """Tasks that the model itself is bad at: what a policy scores there says little."""
    dense = [cell for cell in cells if cell.policy == NONE and cell.setting == KNOWN]
    tasks = {task: score.score for cell in dense for task, score in cell.tasks.items()}
    return [
        f"{task}: without compression the model finds only {score:.0%}, so this task tells little"
        for task, score in tasks.items()
        if score < ENOUGH
    ]


def as_json(cells: Sequence[CellScore]) -> list[dict[str, Any]]:
    return [rounded(asdict(cell)) for cell in cells]


def markdown(cells: Sequence[CellScore]) -> str:
    """A table, one row a policy and budget, both settings side by side."""
    by_place: dict[tuple[str, str], dict[str, CellScore]] = defaultdict(dict)
    for cell in cells:
        by_place[cell.policy, cell.budget][cell.setting] = cell
    head = [
        "policy", "budget", "kept", "known: passkey", "multi-key", "mean", "worst", "KL",
        "unknown: passkey", "multi-key", "ppl", "mean", "worst", "KL",
    ]  # fmt: skip
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for (policy, budget), settings in by_place.items():
        line = [policy, budget, f"{statistics.fmean(cell.kept for cell in settings.values()):.1%}"]
        for setting in SETTINGS:
            line += _columns(settings[setting], setting)
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _columns(cell: CellScore, setting: str) -> list[str]:
    shares = [f"{cell.tasks[task].score:.2f}" for task in ("passkey", "multi-key")]
    if setting == UNKNOWN:
        shares.append(f"{cell.tasks['continuation'].perplexity:.1f}")
    worst = f"{cell.worst:.2f} {cell.worst_task}" if cell.worst < cell.mean else f"{cell.worst:.2f}"
    return [*shares, f"{cell.mean:.2f}", worst, f"{cell.kl:.3f}"]


def plot(path: Path, cells: Sequence[CellScore], title: str) -> None:
    """Mean score by kept share, a panel a setting, a line a policy; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    policies = list(dict.fromkeys(cell.policy for cell in cells if cell.policy != NONE))
    panels = figure.subplots(1, len(SETTINGS), sharey=True)
    for axes, (setting, name) in zip(panels, SETTINGS.items(), strict=True):
        for number, policy in enumerate(policies):
            own = sorted((c for c in cells if (c.policy, c.setting) == (policy, setting)), key=lambda c: c.kept)
            axes.plot(
                [cell.kept for cell in own], [cell.mean for cell in own], "osD^v"[number // 10 % 5] + "-",
                color=f"C{number % 10}", markersize=4, linewidth=1.3, label=policy,
            )  # fmt: skip
        for cell in cells:
            if (cell.policy, cell.setting) == (NONE, setting):
                axes.axhline(cell.mean, color="black", linewidth=0.8, linestyle=":", label=NONE)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("share of the prompt kept")
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.3g}")
        axes.set_title(name, fontsize=10)
        axes.set_ylim(-0.03, 1.05)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("mean score over tasks")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=100)
