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
from collections.abc import Mapping
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
    pool: int | None = None

    @property
    def file(self) -> str:
        words = f"{self.system} {self.profile} rate {self.rate:g}" + (f" pool {self.pool}" if self.pool else "")
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
            there = self.about["identity"]
            for name, value in identity.items():
                if there.get(name) != value:
                    raise Conflict(f"{folder} holds results with {name} {there.get(name)!r}, not {value!r}: "
                                   "they don't compare; take another --out")  # fmt: skip
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

    def merge(self, path: Path) -> None:
        """One file with all of it."""
        _write(path, {"about": self.about, "cells": [cell.as_dict() for cell in self.cells]})


def load(path: Path) -> Results:
    """Of a folder, or of its results.json alone.

    Raises:
        ValueError: there are no results.
    """
    if path.is_dir():
        if not (path / ABOUT).exists():
            raise ValueError(f"{path} holds no results of `longreach loadtest run`")
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        files = sorted((path / "cells").glob("*.json"))
        contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    else:
        merged = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(merged, dict) or not {"about", "cells"} <= set(merged):
            raise ValueError(f"{path} is no {MERGED} of a load test")
        about, contents = merged["about"], merged["cells"]
    cells = [Cell.of(content) for content in contents]
    if not cells:
        raise ValueError(f"{path} holds no load that was measured to its end")
    place = {name: number for number, name in enumerate(about["systems"])}
    cells.sort(key=lambda cell: (cell.key.profile, cell.key.pool or 0, place[cell.key.system], cell.key.rate))
    return Results(about, cells)
