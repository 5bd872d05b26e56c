"""The grid that plans are drawn on: blocks of queries by units of keys, for one chunk of a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

ROWS = 128
"""Queries of a block. Blocks are counted from the chunk's start, so a chunk's last one may hold fewer."""


@dataclass(frozen=True)
class Grid:
    """Which rows a block of queries has, which keys a unit has, and how coarser choices come down to units.

    Units are counted from position 0, blocks of queries from the chunk's start: a chunk that starts behind a prefix of
    any length has blocks that lie anywhere among the units.

    Attributes:
        q_len: queries of the chunk; the last one stands at position `k_len - 1`.
        k_len: keys up to and with the chunk's.
        unit: keys of a unit, a power of two up to 128.
        device: of the masks.
    """

    q_len: int
    k_len: int
    unit: int
    device: torch.device

    def __post_init__(self) -> None:
        if not 0 < self.q_len <= self.k_len:
            raise ValueError(f"a chunk has at least one query and as many keys; got {self.q_len} and {self.k_len}")
        if self.unit < 1 or ROWS % self.unit:
            raise ValueError(f"unit must divide {ROWS}; got {self.unit}")

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.k_len - self.q_len

    @property
    def q_blocks(self) -> int:
        return -(-self.q_len // ROWS)

    @property
    def k_units(self) -> int:
        return -(-self.k_len // self.unit)

    def k_blocks(self, block: int) -> int:
        """How many blocks of so many keys there are."""
        return -(-self.k_len // block)

    @cached_property
    def first_rows(self) -> torch.Tensor:
        """Position of each block's first query, int64 [q_blocks]."""
        return torch.arange(self.offset, self.k_len, ROWS, device=self.device)

    @cached_property
    def last_rows(self) -> torch.Tensor:
        """Position of each block's last query, int64 [q_blocks]."""
        return (self.first_rows + ROWS - 1).clamp(max=self.k_len - 1)

    @cached_property
    def unit_starts(self) -> torch.Tensor:
        """Position of each unit's first key, int64 [k_units]."""
        return torch.arange(0, self.k_len, self.unit, device=self.device)

    @cached_property
    def visible(self) -> torch.Tensor:
        """Units with a key that some row of the block may see, bool [q_blocks, k_units]."""
        return self.unit_starts <= self.last_rows[:, None]

    @cached_property
    def always(self) -> torch.Tensor:
        """What every plan computes: the first 128 keys (the sink) and the block's own; bool [q_blocks, k_units]."""
        return self.band(ROWS, 1)

    @cached_property
    def always_blocks(self) -> torch.Tensor:
        """`always` in blocks of 128 keys: bool [q_blocks, k_blocks(128)]."""
        return Grid(self.q_len, self.k_len, ROWS, self.device).always

    def band(self, sinks: int, window: int) -> torch.Tensor:
        """Units that hold one of the first `sinks` keys, or one of a row's last `window`; bool [q_blocks, k_units]."""
        near = self.unit_starts + self.unit > (self.first_rows - window + 1)[:, None]
        return ((self.unit_starts < sinks) | near) & self.visible

    def from_tokens(self, chosen: torch.Tensor) -> torch.Tensor:
        """Units with a chosen key: bool [..., k_len] -> bool [..., k_units]."""
        padded = F.pad(chosen, (0, self.k_units * self.unit - self.k_len))
        return padded.unflatten(-1, (self.k_units, self.unit)).any(-1)

    def from_blocks(self, chosen: torch.Tensor, block: int) -> torch.Tensor:
        """Units that lie in a chosen block of `block` keys: bool [..., k_blocks(block)] -> bool [..., k_units]."""
        tokens = min(block, self.unit)
        fine = chosen.repeat_interleave(block // tokens, -1)
        per_unit = self.unit // tokens
        fine = F.pad(fine, (0, max(0, self.k_units * per_unit - fine.shape[-1])))[..., : self.k_units * per_unit]
        return fine.unflatten(-1, (self.k_units, per_unit)).any(-1)

    def from_diagonals(self, chosen: torch.Tensor) -> torch.Tensor:
        """Units that a chosen diagonal crosses.

        Args:
            chosen: bool [..., k_len], by distance from query back to key.

        Returns:
            bool [..., q_blocks, k_units].
        """
        counts = F.pad(chosen.long().cumsum(-1), (1, 0))
        near = self.first_rows[:, None] - self.unit_starts - (self.unit - 1)
        far = self.last_rows[:, None] - self.unit_starts
        upto = (far + 1).clamp(0, self.k_len).flatten()
        before = near.clamp(0, self.k_len).flatten()
        return (counts[..., upto] > counts[..., before]).unflatten(-1, (self.q_blocks, self.k_units))

    def from_rule(self, block: int, sees: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """A fixed rule between blocks of `block` tokens, both counted from position 0.

        Rows of one of our blocks may lie in several of the rule's; it then sees what any of them sees.

        Args:
            sees: block of the query int64 [q_blocks, 1] and of the key int64 [k_blocks] -> bool
                [..., q_blocks, k_blocks].

        Returns:
            bool [..., q_blocks, k_units].
        """
        keys = torch.arange(self.k_blocks(block), device=self.device)
        first, last = self.first_rows // block, self.last_rows // block
        seen = sees(first[:, None], keys)
        for step in range(1, -(-ROWS // block) + 1):
            seen = seen | sees((first + step).minimum(last)[:, None], keys)
        return self.from_blocks(seen, block)
