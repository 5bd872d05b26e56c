"""The file of `--config`: looked at before vLLM's parser does, which fails with a traceback."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from server.errors import StartError, one_line

FLAG = "--config"


def split_config(argv: Sequence[str]) -> list[str]:
    """`--config=FILE` in two words: vLLM's parser would take it in and never read the file."""
    words = []
    for word in argv:
        words += [FLAG, word.removeprefix(f"{FLAG}=")] if word.startswith(f"{FLAG}=") else [word]
    return words


def read_config(argv: Sequence[str]) -> dict[str, Any]:
    """The settings in the file that a split command line names; none without one.

    Raises:
        StartError: not one readable YAML file with settings.
    """
    places = [index for index, word in enumerate(argv) if word == FLAG]
    if not places:
        return {}
    if len(places) > 1 or places[0] == len(argv) - 1:
        raise StartError(f"{FLAG} takes one file and may be given once")
    file = Path(argv[places[0] + 1])
    if file.suffix not in (".yaml", ".yml"):
        raise StartError(f"{FLAG} {file}: the name must end in .yaml or .yml")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StartError(f"{FLAG} {file}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise StartError(f"{FLAG} {file}: must hold one setting a line, such as `kv-policy: snapkv`")
    return content


def as_words(content: dict[str, Any]) -> list[str]:
    """Settings as a command line says them."""
    words: list[str] = []
    for name, value in content.items():
        if value is not None and not isinstance(value, bool):
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words
