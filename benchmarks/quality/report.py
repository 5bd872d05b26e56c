"""What a passkey run found: a table by policy and a heat map by policy and depth."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.expect import Policy


@dataclass(frozen=True)
class Row:
    """One request."""

    policy: str
    document: int
    depth: float
    seed: int
    key: str
    found: bool
    text: str
    seconds: float
    meant_tokens: int
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    kv_cache: dict[str, Any] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Summary:
    """One policy over all documents. Means are over the requests that report them, None where none does."""

    policy: str
    budget: int | None
    found: int
    total: int
    errors: int
    kept_tokens: float | None
    kept_fraction: float | None
    bytes_held: float | None
    bytes_freed: float | None
    seconds_median: float


def kept_mean(row: Row) -> float | None:
    """Kept tokens per layer and KV head of one request, if the server told."""
    kept = (row.kv_cache or {}).get("kept_tokens")
    if isinstance(kept, dict):
        kept = kept.get("mean")
    return None if kept is None else float(kept)


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def summarise(policy: Policy, rows: Sequence[Row]) -> Summary:
    kept = [kept_mean(row) for row in rows]
    shares = [k / row.prompt_tokens for k, row in zip(kept, rows, strict=True) if k is not None and row.prompt_tokens]
    return Summary(
        policy=policy.label,
        budget=policy.budget,
        found=sum(row.found for row in rows),
        total=len(rows),
        errors=sum(row.error is not None for row in rows),
        kept_tokens=mean(kept),
        kept_fraction=mean(shares),
        bytes_held=mean([(row.kv_cache or {}).get("bytes_held") for row in rows]),
        bytes_freed=mean([(row.kv_cache or {}).get("bytes_freed") for row in rows]),
        seconds_median=statistics.median(row.seconds for row in rows),
    )


def mebibytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:.2f} MiB"


def table(summaries: Sequence[Summary]) -> str:
    """The summary as a Markdown table; `-` is what the server did not report."""
    head = ["policy", "budget", "found", "kept tokens", "kept", "held/request", "freed/request", "s/request", "errors"]
    lines = [
        [
            s.policy,
            "-" if s.budget is None else str(s.budget),
            f"{s.found}/{s.total}",
            "-" if s.kept_tokens is None else f"{s.kept_tokens:.1f}",
            "-" if s.kept_fraction is None else f"{s.kept_fraction:.1%}",
            mebibytes(s.bytes_held),
            mebibytes(s.bytes_freed),
            f"{s.seconds_median:.2f}",
            str(s.errors),
        ]
        for s in summaries
    ]
    widths = [max(len(line[column]) for line in [head, *lines]) for column in range(len(head))]

    def text(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([text(head), rule, *map(text, lines)])


def heat_map(path: Path, policies: Sequence[Policy], rows: Sequence[Row], title: str) -> None:
    """Rows are policies, columns depths, colour and number the share of documents found."""
    from matplotlib.figure import Figure

    columns = sorted({row.depth for row in rows})
    share: list[list[float]] = []
    for policy in policies:
        cells = [[r.found for r in rows if r.policy == policy.label and r.depth == depth] for depth in columns]
        share.append([sum(cell) / len(cell) if cell else float("nan") for cell in cells])
    figure = Figure(figsize=(3.2 + 0.55 * len(columns), 1.6 + 0.42 * len(policies)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), [f"{depth:.2f}" for depth in columns], rotation=45, ha="right")
    axes.set_yticks(range(len(policies)), [policy.label for policy in policies])
    axes.set_xlabel("depth of the key in the document")
    axes.set_title(title, fontsize=10)
    for y, line in enumerate(share):
        for x, value in enumerate(line):
            if value == value:
                colour = "black" if value > 0.6 else "white"
                axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, label="found")
    figure.savefig(path, dpi=120)
