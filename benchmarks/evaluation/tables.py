"""A summary as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.evaluation.standing import LEAST, Standing, compared, dense_scores, recommend, standings
from benchmarks.evaluation.store import OK
from benchmarks.evaluation.summary import Cell, Summary
from benchmarks.evaluation.variants import DENSE

EXTRA = ("multiturn", "needle", "passkey")
"""Suites of one task whose score stands beside the main suite's."""


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def grid(head: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first columns are words and whose others are numbers."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])


def main_suite(summary: Summary) -> str | None:
    """The one that variants are compared by: RULER, or the first with scores."""
    suites = list(dict.fromkeys(cell.suite for cell in summary.cells if cell.score is not None))
    return "ruler" if "ruler" in suites else next(iter(suites), None)


def dense_table(summary: Summary, suite: str) -> str:
    """Dense scores by task and length; in brackets what is left out of comparisons."""
    lengths = summary.lengths(suite)
    lines = []
    for task, cells in dense_scores(summary, suite).items():
        line = [task]
        for length in lengths:
            cell = cells.get(length)
            text = percent(cell.score if cell else None)
            low = cell is not None and cell.score is not None and cell.score < LEAST
            line.append(f"({text})" if low else text)
        lines.append(line)
    means = ["mean"]
    for length in lengths:
        scores = [cell.score for cell in summary.of(suite, DENSE, length) if cell.score is not None]
        means.append(percent(sum(scores) / len(scores)) if scores else "-")
    return grid(["task, dense", *(f"{length:,}" for length in lengths)], [*lines, means])


def left_out(summary: Summary, suite: str, length: int) -> str:
    """One line on which tasks are compared."""
    own, others = compared(summary, suite, length)
    asked = sorted({sum(cell.statuses.values()) for cell in summary.of(suite, DENSE, length)})
    samples = f"{' to '.join(map(str, dict.fromkeys((asked[0], asked[-1]))))} samples a task" if asked else "no samples"
    if not others:
        return f"{samples.capitalize()}; all {len(own)} tasks are compared."
    return (
        f"{samples.capitalize()}. Compared: {', '.join(own) or 'none'}. Left out, since the dense model scores under "
        f"{LEAST:.0%}: {', '.join(others)}."
    )


def standing_table(summary: Summary, suite: str, length: int) -> str:
    """Every variant: kept, mean, worst task, and what else was measured of it at this length."""
    found = standings(summary, suite, length)
    others = [name for name in EXTRA if name != suite and summary.of(name, DENSE, length)]
    has = {
        name: bool(summary.of(name, DENSE, length)) for name in ("perplexity", "agreement", "speed")
    }  # fmt: skip
    head = ["variant", "kept", "KV held, MiB", "mean", "worst task"]
    head += [*others, *(["perplexity"] if has["perplexity"] else []), *(["agrees", "KL"] if has["agreement"] else [])]
    head += ["TTFT, ms", "per token, ms"] if has["speed"] else []
    lines = []
    for each in found:
        line = [each.variant + ("" if not each.failed else f" ({each.failed} failed)"), _kept(each)]
        line += [number(each.bytes_held / 2**20 if each.bytes_held else None, 0), _mean(each)]
        line.append(f"{percent(each.worst)} {each.worst_task}" if each.worst is not None else "-")
        line += [percent(_score(summary.of(name, each.variant, length))) for name in others]
        if has["perplexity"]:
            line.append(number(_measure(summary, each.variant, "perplexity", length, "perplexity"), 1))
        if has["agreement"]:
            line.append(percent(_score(summary.of("agreement", each.variant, length))))
            line.append(number(_measure(summary, each.variant, "agreement", length, "kl"), 3))
        if has["speed"]:
            line += [number(value * 1e3 if value else None, 1) for value in (each.ttft, each.tpot)]
        lines.append(line)
    return grid(head, lines)


def _mean(each: Standing) -> str:
    return percent(each.mean) + ("" if each.error is None else f" ± {100 * each.error:.0f}")


def _kept(each: Standing) -> str:
    return "-" if each.kept is None else f"{100 * each.kept:.1f} %"


def _score(cells: Sequence[Cell]) -> float | None:
    scores = [cell.score for cell in cells if cell.score is not None]
    return sum(scores) / len(scores) if scores else None


def _measure(summary: Summary, variant: str, suite: str, length: int, name: str) -> float | None:
    values = [cell.measures[name] for cell in summary.of(suite, variant, length) if name in cell.measures]
    return sum(values) / len(values) if values else None


def task_table(summary: Summary, suite: str, length: int) -> str:
    """Every variant by task; tasks that aren't compared in brackets."""
    own, others = compared(summary, suite, length)
    tasks = [*own, *others]
    lines = []
    for variant in summary.variants:
        cells = {cell.task: cell for cell in summary.of(suite, variant, length)}
        if cells:
            lines.append([variant, *(percent(cells[t].score if t in cells else None) for t in tasks)])
    return grid(["variant", *own, *(f"({task})" for task in others)], lines)


def advice_table(summary: Summary, suite: str, length: int) -> str:
    """Which variant for which need."""
    lines = []
    for advice in recommend(summary, suite, length):
        each = advice.chosen
        choice = each.variant if advice.enough else f"none is good enough; best: {each.variant}"
        task = f"{percent(each.worst)} {each.worst_task}"
        lines.append([advice.need, choice, percent(each.mean), task, _kept(each), advice.gain])
    return grid(["need", "variant", "mean", "worst task", "kept", "what it gives"], lines, left=2)


def failure_table(summary: Summary) -> str:
    """What wasn't answered, and why; these rows are in no figure."""
    lines = [
        [str(f["rows"]), f["status"], f["variant"], f["suite"], str(f["error"])[:160].replace("|", "/")]
        for f in summary.failures
    ]
    return grid(["requests", "status", "variant", "suite", "why"], lines, left=5)


def counts(summary: Summary) -> str:
    """How many requests ended how."""
    total: dict[str, int] = {}
    for cell in summary.cells:
        for status, rows in cell.statuses.items():
            total[status] = total.get(status, 0) + rows
    told = ", ".join(f"{rows:,} {status}" for status, rows in sorted(total.items(), key=lambda pair: pair[0] != OK))
    return f"{sum(total.values()):,} requests: {told}"
