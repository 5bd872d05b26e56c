"""Rotary position embedding, done and undone."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotary:
    """The rotations that a model's queries and keys go through (RoPE), as the model itself has them in a table.

    Pair i of a head's first `rotary_dim` numbers is turned by an angle that grows with the position and is, with some
    scalings of long contexts (YaRN), made longer; the other numbers stay.

    Attributes:
        table: [positions, rotary_dim], any float dtype: the cosines of all pairs, then their sines, each times the
            length where there is one. Only looked up in, never copied whole.
        neox: pair i is numbers i and i + rotary_dim / 2; otherwise (interleaved, GPT-J) 2 i and 2 i + 1.
    """

    table: torch.Tensor
    neox: bool

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """As the model does, in float32.

        Args:
            x: [..., head_dim].
            positions: int64, broadcast over the leading dimensions of `x`; inside the table.
        """
        cosines, sines = self._look_up(positions)
        return self._turn(x, cosines, sines)

    def unrotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The inverse of `rotate`, also of a table whose rounding or scaling made vectors longer or shorter."""
        cosines, sines = self._look_up(positions)
        length = cosines.square() + sines.square()
        return self._turn(x, cosines / length, -sines / length)

    def rotate_on_average(self, x: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """`x` [..., head_dim] times the mean of the rotation matrices of positions first ... last - 1: float32.

        Positions behind the table don't exist for the model and are left out; there is always one.
        """
        last = min(max(last, 1), len(self.table))
        rows = self.table[min(first, last - 1) : last].float().mean(0)
        cosines, sines = rows.chunk(2, -1)
        return self._turn(x, cosines, sines)

    def _look_up(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cosines, sines = self.table[positions].float().chunk(2, -1)
        return cosines, sines

    def _turn(self, x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        """Each number is read and written as seldom as torch allows: a prompt's queries are gigabytes."""
        turned = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        rotary_dim = self.table.shape[1]
        if rotary_dim < x.shape[-1]:
            turned[..., rotary_dim:] = x[..., rotary_dim:]
        (a, b), (new_a, new_b) = self._pairs(x), self._pairs(turned)
        torch.mul(a, cosines, out=new_a).addcmul_(b, sines, value=-1)
        torch.mul(b, cosines, out=new_b).addcmul_(a, sines)
        return turned

    def _pairs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The first and the second numbers of all pairs."""
        rotary_dim = self.table.shape[1]
        if self.neox:
            return x[..., : rotary_dim // 2], x[..., rotary_dim // 2 : rotary_dim]
        return x[..., :rotary_dim:2], x[..., 1:rotary_dim:2]
