"""Tables and pictures of runs of `benchmarks.quality.selectors`.

python -m benchmarks.quality.selectors_report FILE.json [FILE.json ...] [--labels LABEL ...] [--markdown FILE.md]
    [--images FOLDER]

Of rows that several files have, the last file's count; their settings are taken to be the last one's. The tables are
printed too. Pictures: selectors-kl.png and selectors-agreement.png; sections that aren't there are left
out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MARKERS = "osD^v"


def title(label: str) -> str:
    """A label of the command line in words."""
    return label.replace("=", " ").replace(",", ", ").replace("_", " ")


def of(rows: Sequence[Row], section: str) -> list[Row]:
    return [row for row in rows if row["section"] == section]


def labels(rows: Sequence[Row]) -> list[str]:
    """In the order of their first rows, dense ones left out."""
    return list(dict.fromkeys(row["label"] for row in rows if row["kind"] != "dense"))


def budgets(rows: Sequence[Row]) -> list[int]:
    return sorted({row["tokens"] for row in rows if row["kind"] != "dense"})


def lines(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *body])


def needles_table(rows: Sequence[Row]) -> str:
    """Keys found of those that dense finds, and so of those far back; the dense line tells how many there are."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    body = []
    for label, tokens in dict.fromkeys((row["label"], row["tokens"]) for row in rows):
        own = {row["task"]: row for row in rows if (row["label"], row["tokens"]) == (label, tokens)}
        dense = next(iter(own.values()))["kind"] == "dense"
        whole = "keys" if dense else "dense"
        cells = [
            f"{row['found']}/{row[whole]}, {row['far_found']}/{row['far_' + whole]}"
            for row in (own[task] for task in tasks)
        ]
        body.append([title(label), str(tokens or "all"), *cells])
    return lines(["", "K", *tasks], body)


def kl_table(rows: Sequence[Row]) -> str:
    """Mean and, behind it, the median; in brackets the steps compared."""

    def cell(row: Row | None) -> str:
        return f"{row['mean']:.2g}, {row['median']:.2g} ({row['compared']})" if row else ""

    by_place = {(row["label"], row["tokens"]): row for row in rows}
    columns = budgets(rows)
    body = [[title(label), *(cell(by_place.get((label, k))) for k in columns)] for label in labels(rows)]
    body += [[row["label"], *[cell(row)] * len(columns)] for row in rows if row["kind"] == "dense"]
    return lines(["", *(f"K = {k:,}" for k in columns)], body)


def agreement_table(rows: Sequence[Row]) -> str:
    head = ["tokens as dense", "K", "least", "quarter", "median", "three quarters", "most", "never parts"]
    body = []
    for row in rows:
        numbers = [f"{row[name]:,.0f}" for name in ("min", "q1", "median", "q3", "max")]
        body.append([title(row["label"]), str(row["tokens"] or "all"), *numbers, f"{row['never']:.0%}"])
    return lines(head, body)


TABLES = {"needles": needles_table, "kl": kl_table, "agreement": agreement_table}


def markdown(rows: Sequence[Row]) -> str:
    return "\n\n".join(make(of(rows, section)) for section, make in TABLES.items() if of(rows, section))


def kl_plot(path: Path, rows: Sequence[Row], heading: str) -> None:
    """By K, a panel each for mean and median, a line a selector; dotted: dense attention once more."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    figure.suptitle(heading, fontsize=10)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, value in zip(panels, ("mean", "median"), strict=True):
        for number, label in enumerate(labels(rows)):
            own = sorted((row for row in rows if row["label"] == label), key=lambda row: int(row["tokens"]))
            axes.plot(
                [row["tokens"] for row in own], [row[value] for row in own],
                MARKERS[number % len(MARKERS)] + "-", markersize=4, linewidth=1.3, label=title(label),
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", nonpositive="mask")
        for row in rows:
            if row["kind"] == "dense" and row[value] > 0:
                axes.axhline(row[value], color="black", linewidth=0.8, linestyle=":", label=row["label"])
        axes.set_xlabel("K, tokens read by a KV head")
        axes.set_xticks(budgets(rows), [str(k) for k in budgets(rows)])
        axes.set_title(value, fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("KL(dense || selector), nats per token")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=100)


def agreement_plot(path: Path, rows: Sequence[Row], heading: str) -> None:
    """A box for every selector, a panel for every K; the box of dense attention in a larger batch in each."""
    from matplotlib.figure import Figure

    columns, floor = budgets(rows), [row for row in rows if row["kind"] == "dense"]
    names = [row["label"] for row in floor] + labels(rows)
    figure = Figure(figsize=(3.0 + 3.2 * len(columns), 1.4 + 0.34 * len(names)), layout="constrained")
    figure.suptitle(heading, fontsize=10)
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, tokens in zip(panels, columns, strict=True):
        shown = [row for row in rows if row["kind"] == "dense" or row["tokens"] == tokens]
        at = [names.index(row["label"]) for row in shown]
        values = [[place + 1 for place in row["first"]] for row in shown]
        axes.boxplot(values, positions=at, orientation="horizontal", widths=0.55, whis=(0, 100))
        axes.set_xscale("log")
        axes.set_yticks(range(len(names)), [title(name) for name in names], fontsize=8)
        axes.set_title(f"K = {tokens:,}", fontsize=10)
        axes.set_xlabel("first token that differs from dense")
        axes.grid(alpha=0.25, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=100)


def together(files: Sequence[dict[str, Any]], wanted: Sequence[str] = ()) -> dict[str, Any]:
    """One run of several: the last one's settings, and of each row the last one there is; of selectors and policies
    those that are wanted, all of them by default."""
    rows = {
        (row["section"], row["kind"], row["label"], row["tokens"], row.get("task")): row
        for results in files
        for row in results["rows"]
        if not wanted or row["kind"] == "dense" or row["label"] in wanted
    }
    return {"settings": files[-1]["settings"], "rows": list(rows.values())}


def images(folder: Path, results: dict[str, Any]) -> list[Path]:
    """Draw what there are rows of; needs matplotlib."""
    rows, settings = results["rows"], results["settings"]
    where, drawn = f"{settings['model']}, {settings['device']}", []
    if found := of(rows, "kl"):
        drawn.append(folder / "selectors-kl.png")
        kl_plot(drawn[-1], found, f"{where}; {settings['kl_prompts']} prompts of {settings['tokens']:,} tokens")
    if found := of(rows, "agreement"):
        drawn.append(folder / "selectors-agreement.png")
        prompts = f"{settings['agreement_prompts']} prompts of {settings['agreement_prompt']:,} tokens"
        agreement_plot(drawn[-1], found, f"{where}; {prompts}, answers of {settings['output_tokens']:,}")
    return drawn


def main(argv: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.selectors_report", description=__doc__, formatter_class=raw
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--labels", nargs="+", default=[], help="selectors that are told, as their rows are labelled")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--images", type=Path, help="folder")
    args = parser.parse_args(argv)
    results = together([json.loads(file.read_text(encoding="utf-8")) for file in args.files], args.labels)
    text = markdown(results["rows"])
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    if args.images:
        images(args.images, results)


if __name__ == "__main__":
    main()
