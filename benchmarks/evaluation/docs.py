"""docs/quality.md: a summary's tables and pictures behind words that don't change with the figures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2

from benchmarks.evaluation import plots, tables
from benchmarks.evaluation.report import Section, sections
from benchmarks.evaluation.summary import Summary, of_files

TEMPLATE = Path(__file__).parent / "quality.md.jinja"


def picture_name(section: Section) -> str:
    """Such as `quality-score-by-budget-ruler-7168.png`."""
    words = "".join(c if c.isalnum() else " " for c in section.title.lower().replace(",", "")).split()
    return f"quality-{'-'.join(word for word in words if word != 'tokens')}.png"


def parts(summary: Summary, links: str) -> Iterator[str]:
    """The sections as Markdown."""
    for section in sections(summary):
        body = f"![{section.title}]({links}/{picture_name(section)})" if section.figure else section.table
        yield "\n\n".join(filter(None, [f"## {section.title}", section.text, body]))


def write_docs(summaries: Sequence[Path], output: Path, images: Path) -> str:
    """Write the page and its pictures; say which.

    Raises:
        ValueError: the summaries don't go together.
    """
    summary = of_files(summaries)
    images.mkdir(parents=True, exist_ok=True)
    links = Path(os.path.relpath(images, output.parent)).as_posix()
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        summary=summary, parts=list(parts(summary, links)), counts=tables.counts(summary),
        names=[path.name for path in summaries],
    )  # fmt: skip
    output.write_text(page, encoding="utf-8")
    written = [output]
    for section in sections(summary):
        if section.figure:
            written.append(images / picture_name(section))
            written[-1].write_bytes(plots.png(section.figure))
    return "\n".join(map(str, written))
