"""How variants compare: mean and worst task, by tasks that the dense model itself can do."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from benchmarks.evaluation.summary import Cell, Summary, mean
from benchmarks.evaluation.variants import DENSE, PATTERN, POLICY, SELECTOR

LEAST = 0.30
"""What the dense model has to score for a task to tell anything of others."""
GOOD = 0.95
"""Share of the dense mean that a recommended variant has to reach."""
BELOW = 0.80
"""Share of the dense score that it has to reach in every single task."""


@dataclass(frozen=True)
class Standing:
    """One variant at one length.

    Attributes:
        mean: over the compared tasks; None if one of them has no answer at all.
        error: its standard error, by the samples' spread within each task; None with single samples.
        least: the lowest share of a task's dense score, and `least_task` which.
        failed: rows of the compared tasks that aren't in the figures.
        ttft, tpot: seconds, from the suite `speed`.
    """

    variant: str
    length: int
    mean: float | None
    error: float | None
    worst: float | None
    worst_task: str
    least: float | None
    least_task: str
    kept: float | None
    bytes_held: float | None
    failed: int
    ttft: float | None = None
    tpot: float | None = None


def compared(summary: Summary, suite: str, length: int) -> tuple[list[str], list[str]]:
    """Tasks that are compared, and those that aren't since dense is under `LEAST` or has no answers."""
    dense = {cell.task: cell.score for cell in summary.of(suite, DENSE, length)}
    kept = [task for task, score in dense.items() if score is not None and score >= LEAST]
    return kept, [task for task in dense if task not in kept]


def standing(summary: Summary, suite: str, variant: str, length: int) -> Standing | None:
    """None where the variant has no rows."""
    tasks, _ = compared(summary, suite, length)
    cells = {cell.task: cell for cell in summary.of(suite, variant, length)}
    if not cells or not tasks:
        return None
    own = [cells[task] for task in tasks if task in cells]
    scores = {cell.task: cell.score for cell in own if cell.score is not None}
    whole = len(scores) == len(tasks)
    speed = summary.cell(variant, "speed", "speed", length)
    worst = min(scores, key=scores.__getitem__, default="")
    shares = {task: score / _dense(summary, suite, task, length) for task, score in scores.items()}
    least = min(shares, key=shares.__getitem__, default="")
    errors = [cell.error for cell in own if cell.error is not None]
    spread = sum(error**2 for error in errors) ** 0.5 / len(own) if errors and len(errors) == len(own) else None
    return Standing(
        variant, length, statistics.fmean(scores.values()) if whole else None, spread if whole else None,
        scores.get(worst), worst, shares.get(least), least,
        mean(cell.kept for cell in own), mean(cell.bytes_held for cell in own), sum(cell.failed for cell in own),
        speed.measures.get("ttft") if speed else None, speed.measures.get("tpot") if speed else None,
    )  # fmt: skip


def _dense(summary: Summary, suite: str, task: str, length: int) -> float:
    cell = summary.cell(DENSE, suite, task, length)
    assert cell is not None and cell.score
    return cell.score


def standings(summary: Summary, suite: str, length: int) -> list[Standing]:
    found = [standing(summary, suite, variant, length) for variant in summary.variants]
    return [each for each in found if each is not None]


@dataclass(frozen=True)
class Advice:
    """Which variant for which need. `enough`: it is good enough; else it is only the best there is."""

    need: str
    chosen: Standing
    enough: bool
    gain: str


def enough(each: Standing, dense: Standing) -> bool:
    """Good enough to be recommended: on the mean, and in the worst task beside dense."""
    if each.mean is None or dense.mean is None or each.least is None:
        return False
    return each.mean >= GOOD * dense.mean and each.least >= BELOW


def recommend(summary: Summary, suite: str, length: int) -> list[Advice]:
    """By rule, not by taste: of the variants that are good enough the one that saves most, else the best one."""
    found = {each.variant: each for each in standings(summary, suite, length)}
    dense = found.get(DENSE)
    if dense is None:
        return []
    needs = [
        ("Little memory; the question is in the prompt", POLICY, "known"),
        ("Little memory; one document, questions that come later", POLICY, "unknown"),
        ("Nothing is lost for good; each step reads little", SELECTOR, None),
        ("The first token sooner", PATTERN, None),
    ]
    advice = []
    for need, group, question in needs:
        own = [
            found[name]
            for name, words in summary.variants.items()
            if name in found and words["group"] == group and words["question"] in (question, None)
            and found[name].mean is not None and words["method"] != "random"
        ]  # fmt: skip
        if not own:
            continue
        good = [each for each in own if enough(each, dense)]
        if group == POLICY:
            best = min(good, key=lambda each: (each.kept or 1.0, -(each.mean or 0)), default=None)
        elif group == SELECTOR:
            best = min(good, key=lambda each: (_budget(summary, each), -(each.mean or 0)), default=None)
        else:
            sooner = [each for each in good if each.ttft and dense.ttft and each.ttft < dense.ttft]
            best = min(sooner, key=lambda each: each.ttft or float("inf"), default=None)
        chosen = best or max(own, key=lambda each: each.mean or 0.0)
        advice.append(Advice(need, chosen, best is not None, _gain(summary, chosen, dense, group)))
    return advice


def _budget(summary: Summary, each: Standing) -> float:
    budget = summary.variants[each.variant]["budget"]
    return float(budget) if budget and budget.replace(".", "").isdigit() else float("inf")


def _gain(summary: Summary, each: Standing, dense: Standing, group: str) -> str:
    if group == POLICY and each.bytes_held and dense.bytes_held:
        return f"{dense.bytes_held / each.bytes_held:.1f} times less KV cache"
    if group == SELECTOR and (budget := summary.variants[each.variant]["budget"]):
        return f"reads {budget} tokens a step"
    if group == PATTERN and each.ttft and dense.ttft:
        return f"{dense.ttft / each.ttft:.2f} times as fast to the first token"
    return "not measured"


def dense_scores(summary: Summary, suite: str) -> dict[str, dict[int, Cell]]:
    """By task and length."""
    found: dict[str, dict[int, Cell]] = {}
    for cell in summary.of(suite, DENSE):
        found.setdefault(cell.task, {})[cell.length] = cell
    return found
