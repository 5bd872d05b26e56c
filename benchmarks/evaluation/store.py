"""Results: a folder with one JSON line for every answer, and a file that says what they are of.

Lines are only ever appended. A run that was killed leaves at most one torn line, which is cut off when the folder is
opened again; what is there isn't asked again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.evaluation.suite import Place

OK, ERROR, TIMEOUT, TRUNCATED = "ok", "error", "timeout", "truncated"
STATUSES = (OK, ERROR, TIMEOUT, TRUNCATED)
Key = tuple[Place, str]


@dataclass(frozen=True)
class Row:
    """One request.

    Attributes:
        status: only `ok` rows have a score; the others say why in `error`.
        prompt_tokens: as the server counts; `sent_tokens` as we do.
        kept: share kept of the tokens that compaction saw, mean over layers and KV heads; None where nobody tells.
        steps: of a selector, by what they read.
    """

    suite: str
    task: str
    length: int
    seed: int
    index: int
    variant: str
    status: str
    score: float | None = None
    error: str | None = None
    text: str = ""
    finish_reason: str | None = None
    sent_tokens: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    kept: float | None = None
    bytes_held: int | None = None
    steps: dict[str, int] | None = None
    seconds: float | None = None
    ttft: float | None = None
    measures: dict[str, float] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    keep: Any = None

    @property
    def place(self) -> Place:
        return Place(self.suite, self.task, self.length, self.seed, self.index)

    @property
    def key(self) -> Key:
        return self.place, self.variant

    def line(self) -> str:
        """JSON without what is empty."""
        told = {name: value for name, value in asdict(self).items() if value not in (None, "", {})}
        return json.dumps(told, ensure_ascii=False)


class Conflict(ValueError):
    """The folder is of another run, or somebody writes to it."""


class Store:
    """A folder of results, open for appending; one process at a time."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """
        Args:
            identity: what all rows have in common (model, tokenizer, haystack); and `variants`, which may grow, but
                whose fields may not change.

        Raises:
            Conflict: the folder's rows are of something else, or another process has it open.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.about = folder / "results.jsonl", folder / "run.json"
        self.file = self.path.open("ab")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Conflict(f"{self.path} is being written by another process") from error
        self._describe(identity)
        self.mended = self._mend()
        self.rows = {row.key: row for row in read(folder)}
        self.seconds = float(self.about_now().get("seconds") or 0)

    def _describe(self, identity: Mapping[str, Any]) -> None:
        old = self.about_now() if self.about.exists() else {}
        variants = {**old.get("variants", {}), **identity["variants"]}
        for name, value in {**identity, "variants": {k: variants[k] for k in old.get("variants", {})}}.items():
            if name in old and old[name] != value:
                raise Conflict(f"{self.about} has another {name}: name another folder for other settings")
        self._write({**old, **identity, "variants": variants})

    def _mend(self) -> int:
        """Bytes of a torn last line, which are cut off."""
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        os.truncate(self.path, whole)
        return len(data) - whole

    def add(self, row: Row) -> None:
        """Written through to the kernel at once: a killed process loses nothing that it has added."""
        self.file.write(f"{row.line()}\n".encode())
        self.file.flush()
        self.rows[row.key] = row

    def about_now(self) -> dict[str, Any]:
        """What is said about the run."""
        content: dict[str, Any] = json.loads(self.about.read_text(encoding="utf-8"))
        return content

    def note(self, **facts: Any) -> None:
        """Add facts to what is said about the run."""
        self._write({**self.about_now(), **facts})

    def _write(self, content: Mapping[str, Any]) -> None:
        temporary = self.about.with_suffix(".part")
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(self.about)

    def close(self) -> None:
        self.file.close()


def read(folder: Path) -> Iterator[Row]:
    """The latest row of every key, without those of a torn last line.

    Raises:
        Conflict: a line in the middle isn't a row.
    """
    found: dict[Key, Row] = {}
    path = folder / "results.jsonl"
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = Row(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise Conflict(f"{path}, line {number}: {error}") from error
        found[row.key] = row
    yield from found.values()
