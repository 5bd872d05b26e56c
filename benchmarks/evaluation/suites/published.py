"""What suites of published data have in common: entries from files of a local folder."""

from __future__ import annotations

import json
from abc import abstractmethod
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from benchmarks.evaluation.suite import Suite
from benchmarks.evaluation.tokens import Prompt


class Published(Suite):
    """A suite that reads its samples. They are as long as they are: `lengths` stays empty."""

    lengths: list[int] = Field(default=[0], max_length=1)
    folder: Path = Field(description="where the files are")
    samples: int = Field(default=1_000_000, ge=1, description="of each task at most, from the first on")

    @abstractmethod
    def entries(self, task: str) -> list[dict[str, Any]]:
        """A task's samples, as they are published."""

    def indices(self, task: str) -> range:
        return range(min(self.samples, len(self.entries(task))))


@cache
def read_entries(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, or in a JSON list.

    Raises:
        ValueError: it is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
        entries = json.loads(text) if text.lstrip().startswith("[") else list(map(json.loads, text.splitlines()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{path}: must hold a list of objects, or an object a line")
    return list(entries)


def cut_middle(prompt: Prompt, room: int) -> Prompt:
    """LongBench's rule for prompts that are too long: the first and the last half of the room stay."""
    first = room // 2
    last = room - first
    return Prompt(prompt.ids[:first] + prompt.ids[len(prompt.ids) - last :], min(prompt.hidden, last))
