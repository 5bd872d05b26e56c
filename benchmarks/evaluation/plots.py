"""Pictures of a summary. They need matplotlib, which the extra `explain` brings."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.evaluation.standing import Standing, standings
from benchmarks.evaluation.summary import Summary
from benchmarks.evaluation.variants import DENSE, OTHER, PATTERN, POLICY, SELECTOR

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTINGS = {"known": "question known", "unknown": "question unknown"}
MARKERS = {DENSE: "*", POLICY: "o", SELECTOR: "s", PATTERN: "^", OTHER: "D"}
PANELS = 28
"""Heat maps in one picture at most."""


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def png(figure: Figure, dpi: int = 110) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def by_budget(summary: Summary, suite: str, length: int) -> Figure | None:
    """Mean and worst task by the share kept, a panel a setting, a line a policy. None without policies."""
    from matplotlib.figure import Figure

    found = {each.variant: each for each in standings(summary, suite, length)}
    own = {name: summary.variants[name] for name in found if summary.variants[name]["group"] == POLICY}
    own = {name: words for name, words in own.items() if None not in (found[name].kept, found[name].worst)}
    settings = [setting for setting in SETTINGS if any(words["question"] == setting for words in own.values())]
    if not settings:
        return None
    methods = list(dict.fromkeys(words["method"] for words in own.values()))
    figure = Figure(figsize=(4.4 * len(settings) + 2.4, 6.6), layout="constrained")
    figure.suptitle(f"{suite}, {length:,} tokens: mean over tasks, and the worst task", fontsize=10)
    panels = figure.subplots(2, len(settings), sharex=True, sharey=True, squeeze=False)
    for column, setting in enumerate(settings):
        for row, figure_name in enumerate(("mean", "worst")):
            axes = panels[row][column]
            for number, method in enumerate(methods):
                points = [
                    (found[name].kept, getattr(found[name], figure_name))
                    for name, words in own.items()
                    if words["method"] == method and words["question"] == setting
                ]
                points = sorted(point for point in points if None not in point)
                line = f"{'osD^vP'[number // 10 % 6]}-"
                axes.plot(
                    *zip(*points, strict=True) if points else ([], []), line, color=f"C{number % 10}", markersize=4,
                    linewidth=1.3, label=method,
                )  # fmt: skip
            if DENSE in found and (level := getattr(found[DENSE], figure_name)) is not None:
                axes.axhline(level, color="black", linewidth=0.9, linestyle=":", label=DENSE)
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda share, _: f"{share:.3g}")
            axes.set_ylim(-0.03, 1.05)
            _tidy(axes)
            if row == 0:
                axes.set_title(SETTINGS[setting], fontsize=10)
            else:
                axes.set_xlabel("share of the prompt kept")
            if column == 0:
                axes.set_ylabel("mean score" if row == 0 else "score of the worst task")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def trade_offs(summary: Summary, suite: str, length: int) -> Figure | None:
    """Mean score against the first token's time and against the KV cache held. None where neither is known."""
    from matplotlib.figure import Figure

    found = standings(summary, suite, length)
    axes_of = [("ttft", "milliseconds to the first token", 1e3), ("bytes_held", "KV cache held, MiB", 2.0**-20)]
    there = [entry for entry in axes_of if sum(getattr(each, entry[0]) is not None for each in found) > 1]
    if not there:
        return None
    figure = Figure(figsize=(6.4 * len(there), 5.0), layout="constrained")
    figure.suptitle(f"{suite}, {length:,} tokens: what it costs, what it is worth", fontsize=10)
    for axes, (name, label, scale) in zip(figure.subplots(1, len(there), squeeze=False)[0], there, strict=True):
        points = [(getattr(each, name) * scale, each.mean, each) for each in found if getattr(each, name) is not None]
        points = [point for point in points if point[1] is not None]
        for group, marker in MARKERS.items():
            for setting, face in ((("known", None), True), (("unknown",), False)):
                own = [p for p in points if _is(summary, p[2], group) and _question(summary, p[2]) in setting]
                if own:
                    colour = "black" if group == DENSE else f"C{list(MARKERS).index(group)}"
                    axes.scatter(
                        [x for x, _, _ in own], [y for _, y, _ in own], marker=marker, s=90 if group == DENSE else 26,
                        edgecolors=colour, facecolors=colour if face else "none", alpha=0.8,
                        label=group if face else f"{group}, question unknown",
                    )  # fmt: skip
        for x, y, each in _front(points):
            axes.annotate(each.variant, (x, y), fontsize=7, xytext=(4, -9), textcoords="offset points")
        axes.set_xlabel(label)
        axes.set_ylabel("mean score")
        axes.set_ylim(-0.03, 1.05)
        axes.set_xlim(left=0)
        axes.legend(fontsize=7, loc="lower right")
        _tidy(axes)
    return figure


def _is(summary: Summary, each: Standing, group: str) -> bool:
    return bool(summary.variants[each.variant]["group"] == group)


def _question(summary: Summary, each: Standing) -> str | None:
    question: str | None = summary.variants[each.variant]["question"]
    return question


def _front(points: Sequence[tuple[float, Any, Standing]]) -> list[tuple[float, Any, Standing]]:
    """Those that no other beats in both, one of those that are equal; they are named in the picture."""
    front: list[tuple[float, Any, Standing]] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front


def needle_maps(summary: Summary, suite: str) -> Figure | None:
    """Found by depth and length, a panel a variant; with one length, a row a variant. None without such cells."""
    cells = [cell for cell in summary.of(suite) if cell.depths]
    if not cells:
        return None
    variants = [name for name in summary.variants if any(cell.variant == name for cell in cells)]
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({depth for cell in cells for depth in cell.depths}, key=float)
    by_place = {(cell.variant, cell.length): cell.depths for cell in cells}
    if len(lengths) == 1:
        rows = [[by_place.get((name, lengths[0]), {}).get(depth) for depth in depths] for name in variants]
        title = f"{suite}, {lengths[0]:,} tokens: found, by depth"
        return _one_map(rows, variants, [f"{depth} %" for depth in depths], title)
    return _many_maps(_chosen(summary, variants), by_place, lengths, depths, suite)


def _chosen(summary: Summary, variants: Sequence[str]) -> list[str]:
    """At most as many as there is room for: the dense one, then every method at its middle budget, then the others."""
    if len(variants) <= PANELS:
        return list(variants)
    groups: dict[tuple[Any, Any], list[str]] = {}
    for name in variants:
        words = summary.variants[name]
        groups.setdefault((words["method"], words["question"]), []).append(name)
    first = [names[len(names) // 2] for names in groups.values()]
    rest = [name for name in variants if name not in first]
    chosen = set((first + rest)[:PANELS])
    return [name for name in variants if name in chosen]


Rows = Sequence[Sequence[float | None]]


def _one_map(rows: Rows, names: Sequence[str], columns: Sequence[str], title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 + 0.45 * len(columns), 1.5 + 0.24 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    image = _map(axes, rows)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, label="found")
    return figure


def _many_maps(
    names: Sequence[str], by_place: Any, lengths: Sequence[int], depths: Sequence[str], suite: str
) -> Figure:
    from matplotlib.figure import Figure

    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(0.9 + columns * (1.3 + 0.45 * len(lengths)), 0.8 + 2.1 * lines), layout="constrained")
    figure.suptitle(f"{suite}: found, by depth (down) and length (across)", fontsize=10)
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    image: Any = None
    for place, axes in enumerate(panels.flat):
        if place >= len(names):
            axes.set_visible(False)
            continue
        rows = [[by_place.get((names[place], length), {}).get(depth) for length in lengths] for depth in depths]
        image = _map(axes, rows)
        axes.set_title(names[place], fontsize=7)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=6, rotation=45)
        axes.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths], fontsize=6)
    figure.colorbar(image, ax=panels, label="found", shrink=0.6)
    return figure


def _map(axes: Any, rows: Rows) -> Any:
    values = [[float("nan") if value is None else value for value in row] for row in rows]
    image = axes.imshow(values, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value == value and len(row) * len(values) <= 800:
                colour = "black" if value > 0.6 else "white"
                axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=6, color=colour)
    return image
