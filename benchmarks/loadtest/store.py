"""Results: a folder with a JSON file for every cell, which is one system at one rate with one profile and pool.

A cell's file is written when its load has ended, so a run that is broken off leaves whole cells, and the same command
goes on with those that are missing. Later commands may add systems, profiles, rates and pools.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.loadtest.records import Record

ABOUT, MERGED = "run.json", "results.json"


class Conflict(ValueError):
    """The folder is of a run that can't be compared with this one."""


@dataclass(frozen=True)
class Key:
    """Which cell. `rate`: conversations that begin a second, or infinite; `pool`: bytes of KV cache, or None."""

    profile: str
    system: str
    rate: float
    requests: int
    pool: int | None = None

    @property
    def file(self) -> str:
        words = f"{self.system} {self.profile} rate {self.rate:g}x{self.requests}"
        words += f" pool {self.pool}" if self.pool else ""
        # Names that differ in nothing but signs must not share a file.
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', words)[:100]}-{zlib.crc32(words.encode()):08x}.json"


@dataclass
class Cell:
    """What was measured.

    Attributes:
        fields: of the requests' bodies.
        compresses: whether they ask for a policy, selector or pattern.
        server: version, model and command or nothing.
        usage: what an answer told of how it was made, before the load.
        seconds: that the load took, drained.
        metrics: vLLM's figures of requests that are done.
        watched: `Watched` as a dictionary.
        most_in_flight: requests that were under way at once.
        requests: one each.
    """

    key: Key
    fields: dict[str, Any]
    compresses: bool
    server: dict[str, Any]
    usage: dict[str, Any]
    seconds: float
    metrics: dict[str, Any]
    watched: dict[str, Any]
    most_in_flight: int
    requests: list[Record] = field(default_factory=list)

    def count(self, status: str) -> int:
        return sum(request.status == status for request in self.requests)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: requests as columns, which takes a fifth of the room."""
        columns = {
            one.name: [_short(getattr(request, one.name)) for request in self.requests] for one in fields(Record)
        }
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("key", "requests")}
        return {"key": asdict(self.key), **plain, "requests": columns}

    @classmethod
    def of(cls, content: dict[str, Any]) -> Cell:
        columns = content["requests"]
        rows = zip(*columns.values(), strict=True)
        requests = [Record(**dict(zip(columns, row, strict=True))) for row in rows]
        key = Key(**{**content["key"], "rate": float(content["key"]["rate"])})
        return cls(**{**content, "key": key, "requests": requests})


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


class Store:
    """A folder of cells."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """
        Args:
            identity: what all cells have in common.

        Raises:
            Conflict: other results are there.
        """
        self.folder = folder
        self.cells = folder / "cells"
        self.about: dict[str, Any] = {"identity": dict(identity), "commands": [], "systems": []}
        if (folder / ABOUT).exists():
            self.about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            _same(self.about["identity"], identity, f"{folder}: take another --out")
        self.cells.mkdir(parents=True, exist_ok=True)

    def note(self, command: str, **told: Any) -> None:
        """Say how a run was started, and anything else."""
        self.about["commands"].append(command)
        self.tell(**told)

    def tell(self, **told: Any) -> None:
        self.about |= told
        _write(self.folder / ABOUT, self.about)

    def has(self, key: Key) -> bool:
        return (self.cells / key.file).exists()

    def add(self, cell: Cell) -> None:
        if cell.key.system not in self.about["systems"]:
            self.tell(systems=[*self.about["systems"], cell.key.system])
        _write(self.cells / cell.key.file, cell.as_dict())


def _write(path: Path, content: Any) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(_finite(content), ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def _finite(content: Any) -> Any:
    """JSON has no infinite numbers: as text."""
    if isinstance(content, float) and not math.isfinite(content):
        return str(content)
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return content


@dataclass
class Results:
    """Everything in a folder, cells by profile, pool, system and rate."""

    about: dict[str, Any]
    cells: list[Cell]

    def write(self, path: Path) -> None:
        """One file with all of it."""
        _write(path, {"about": self.about, "cells": [cell.as_dict() for cell in self.cells]})


def _same(there: Mapping[str, Any], identity: Mapping[str, Any], where: str) -> None:
    """
    Raises:
        Conflict: results of these two don't compare.
    """
    for name, value in identity.items():
        if there.get(name) != value:
            raise Conflict(
                f"results with {name} {value!r} don't compare with those with {there.get(name)!r} in {where}"
            )


def load(sources: Sequence[Path]) -> Results:
    """Of folders, or of their results.json alone. Of a cell that several have, the first one's counts.

    Raises:
        ValueError: there are no results, or they don't compare.
    """
    about: dict[str, Any] = {}
    cells: dict[Key, Cell] = {}
    for source in sources:
        told, contents = _content(source)
        if about:
            _same(about["identity"], told["identity"], str(sources[0]))
            about["systems"] += [name for name in told["systems"] if name not in about["systems"]]
            about["commands"] += told["commands"]
            about["not_begun"] = [*about.get("not_begun", []), *told.get("not_begun", [])]
        about = about or told
        for content in contents:
            cell = Cell.of(content)
            cells.setdefault(cell.key, cell)
    if not cells:
        raise ValueError(f"{', '.join(map(str, sources))}: no load was measured to its end")
    place = {name: number for number, name in enumerate(about["systems"])}
    order = sorted(
        cells.values(),
        key=lambda cell: (
            _by_number(cell.key.profile),
            cell.key.pool or 0,
            place[cell.key.system],
            cell.key.rate,
            -cell.key.requests,
        ),
    )
    return Results(about, order)


def _by_number(text: str) -> list[tuple[int, str]]:
    """To sort by: numbers in it by their size."""
    return [(int(part) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", text)]


def _content(source: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a folder, or a results.json, says of itself, and its cells."""
    if source.is_dir():
        if not (source / ABOUT).exists():
            raise ValueError(f"{source} holds no results of `longreach loadtest run`")
        files = sorted((source / "cells").glob("*.json"))
        about = json.loads((source / ABOUT).read_text(encoding="utf-8"))
        return about, [json.loads(file.read_text(encoding="utf-8")) for file in files]
    merged = json.loads(source.read_text(encoding="utf-8"))
    if not isinstance(merged, dict) or not {"about", "cells"} <= set(merged):
        raise ValueError(f"{source} is no {MERGED} of a load test")
    return merged["about"], merged["cells"]
