"""What a server has decided about selectors, as scheduler and workers get it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STATES = 64
"""Most requests that select in a step, and that something is remembered of, unless the server says otherwise."""
_SPREAD = 4
"""How many times the cache's tokens the rows of a step may have together: those of a shared prefix count for each."""


@dataclass(frozen=True)
class DecodeSettings:
    """`additional_config["longreach"]["decode"]`.

    Attributes:
        selectors: those that requests may use; each costs memory, and CUDA graphs.
        states: most requests that select in a step, and that workers keep state of.
        calibration: file that `longreach calibrate` wrote, or None.
    """

    selectors: tuple[str, ...] = ()
    states: int = STATES
    calibration: str | None = None

    @classmethod
    def of(cls, additional_config: Mapping[str, Any] | None) -> DecodeSettings:
        found = (additional_config or {}).get("longreach", {}).get("decode", {})
        return cls(tuple(found.get("selectors", ())), int(found.get("states", STATES)), found.get("calibration"))


def score_capacity(num_blocks: int, page_size: int, max_model_len: int) -> int:
    """Columns of the buffers of scores: tokens, in whole pages, of all rows of a step that select."""
    longest = -(-max_model_len // page_size) * page_size
    return max(num_blocks * page_size * _SPREAD, longest)
