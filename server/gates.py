"""Files of head gates: one number for each KV head of each layer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from server.errors import StartError, one_line


def read_gates(file: str | Path) -> list[list[float]]:
    """Read gates: JSON (a list of lists), or a row of numbers a layer, as in the published `full_attention_heads.tsv`.

    Learnt gates may lie a little outside 0 ... 1 and are clipped, as their authors do.

    Raises:
        StartError: the file can't be read, or isn't a table of numbers.
    """
    try:
        text = Path(file).read_text(encoding="utf-8").strip()
        rows: Any = json.loads(text) if text.startswith("[") else [line.split() for line in text.splitlines()]
        gates = [[float(number) for number in row] for row in rows]
    except OSError as error:
        raise StartError(f"--kv-head-gates {file}: {one_line(error)}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise StartError(
            f"--kv-head-gates {file}: {one_line(error)}: it must hold a row of numbers a layer, or JSON [[...], ...]"
        ) from error
    if not gates or not gates[0]:
        raise StartError(f"--kv-head-gates {file}: holds no numbers")
    for line, row in enumerate(gates, 1):
        if len(row) != len(gates[0]):
            raise StartError(f"--kv-head-gates {file}: layer {line} has {len(row)} gates, the first {len(gates[0])}")
        if not all(map(math.isfinite, row)):
            raise StartError(f"--kv-head-gates {file}: layer {line} has a gate that is no number")
    return [[min(max(gate, 0.0), 1.0) for gate in row] for row in gates]


def write_gates(file: str | Path, gates: list[list[float]]) -> None:
    """Write gates as a TSV, a row a layer.

    Raises:
        OSError: the file can't be written.
    """
    rows = ("\t".join(f"{gate:.6f}" for gate in row) for row in gates)
    Path(file).write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
