"""What a prompt's last queries chose, kept on a request's lists: one step's query, or a bound, loses sight of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field

from attention_plugins.decode.base import KERNEL, Place, Selector, SelectorArgs
from attention_plugins.decode.rows import DecodeRows, Mode
from kvcache.evidence import LayerEvidence
from kvcache.scorers import window_votes
from kvcache.selection import keep_top

WINDOW = 32
"""How many queries choose, as SnapKV's here."""
MOST = 0.5
"""Largest share of a list."""
_FIRST = torch.finfo(torch.float32).max
_BITS = 8


class PinArgs(SelectorArgs):
    """Arguments of selectors whose steps leave a part of what they read to the prompt's choice."""

    window: int = Field(
        WINDOW,
        ge=0,
        le=256,
        description="Last queries of the prompt that choose what is pinned, at most `tokens` / 4.",
    )
    pinned: float = Field(MOST, ge=0, le=MOST, description="Share of `tokens` that is kept for what these chose.")


class Pinning(Selector):
    """A selector with `PinArgs`; with 0 for either of them it is its paper's."""

    keeps_state = True
    prepares = True

    @property
    def window(self) -> int:
        return min(self.args.window, self.args.tokens // 4) if self.args.pinned else 0

    @property
    def wants_state(self) -> bool:
        return self.window > 0

    @property
    def pinned(self) -> int:
        return int(self.args.tokens * self.args.pinned) if self.window else 0


def prompt_votes(prompt: LayerEvidence, kernel: int = KERNEL) -> torch.Tensor:
    """The most that a prompt's last queries give to a token, or to one near it; of a group the strongest counts.

    Args:
        kernel: tokens over which that is pooled, odd.

    Returns:
        float32 [num_kv_heads, n - w], of the tokens before the window; no NaN.
    """
    votes = window_votes(prompt, pooling="max", kernel=kernel, group_reduce="max", window_reduce="max")
    return votes.nan_to_num(nan=float("inf"), posinf=float("inf"))


def _best(votes: torch.Tensor, count: int) -> torch.Tensor:
    """So many of each head, or all there are, ascending: float32 [num_kv_heads, n] -> int64 [num_kv_heads, m]."""
    heads, n = votes.shape
    return keep_top(votes, torch.full((heads,), min(count, n)))


class Pins:
    """Places of pinned tokens, by group of layers that read one list, by request and KV head.

    Attributes:
        places: int32 [groups, states, num_kv_heads, m], ascending; -1 where nothing is pinned.
    """

    def __init__(self, place: Place, groups: int) -> None:
        shape = groups, place.states, place.geometry.num_kv_heads, self._most(place)
        self.places = torch.full(shape, -1, dtype=torch.int32, device=place.device)

    @staticmethod
    def _most(place: Place) -> int:
        return int(place.tokens * MOST)

    @classmethod
    def nbytes(cls, place: Place, groups: int) -> int:
        """Memory of `places`."""
        return 4 * groups * place.states * place.geometry.num_kv_heads * cls._most(place)

    def clear(self, state: int) -> None:
        """Nothing is pinned of a request that comes to this state, or was compacted, until its prompt chooses."""
        self.places[:, state] = -1

    def choose(self, group: int, state: int, votes: torch.Tensor, count: int) -> None:
        """Pin the places of the highest votes.

        Args:
            votes: float32 [num_kv_heads, n], no NaN.
            count: how many of each head, or all there are.
        """
        places = _best(votes, count)
        self.places[group, state, :, : places.shape[-1]] = places.int()

    def raise_scores(self, scores: torch.Tensor, rows: DecodeRows, group: int) -> None:
        """Let what is pinned of rows that select come before all others.

        Args:
            scores: float32 [num_kv_heads, columns], not negative, from `rows.starts` on.
        """
        pinned = self.places[group].index_select(0, rows.places.clamp(min=0).long())
        selects = ((rows.modes & int(Mode.SELECT)) != 0) & (rows.places >= 0)
        real = selects[:, None, None] & (pinned >= 0)
        # What pins nothing adds nothing, to columns that differ: no thousands of writes to one of them.
        spare = torch.arange(pinned[:, 0].numel(), device=pinned.device).view(len(pinned), 1, -1) % scores.shape[1]
        columns = torch.where(real, rows.starts[:, None, None] + pinned, spare)
        first = torch.where(real, _FIRST, 0.0)
        scores.scatter_reduce_(1, columns.transpose(0, 1).flatten(1), first.transpose(0, 1).flatten(1), "amax")


class PinnedPages:
    """Which pages are pinned, by layer, request and KV head: one bit each, for a kernel that sees all of them anyway.

    Attributes:
        bits: uint8 [num_layers, states, num_kv_heads, ceil(width / 8)]; page p is bit p % 8 of byte p // 8.
    """

    def __init__(self, place: Place) -> None:
        g = place.geometry
        shape = g.num_layers, place.states, g.num_kv_heads, -(-place.width // _BITS)
        self.bits = torch.zeros(shape, dtype=torch.uint8, device=place.device)

    @staticmethod
    def nbytes(place: Place) -> int:
        """Memory of `bits`."""
        g = place.geometry
        return g.num_layers * place.states * g.num_kv_heads * -(-place.width // _BITS)

    def clear(self, state: int) -> None:
        """See `Pins.clear`."""
        self.bits[:, state] = 0

    def choose(self, layer: int, state: int, votes: torch.Tensor, count: int) -> None:
        """Pin the pages of the highest votes.

        Args:
            votes: float32 [num_kv_heads, pages], no NaN.
            count: how many of each head, or all there are.
        """
        pages = _best(votes, count)
        pinned = torch.zeros(len(votes), self.bits.shape[-1] * _BITS, dtype=torch.uint8, device=votes.device)
        pinned.scatter_(1, pages, 1)
        weights = 1 << torch.arange(_BITS, dtype=torch.uint8, device=votes.device)
        self.bits[layer, state] = (pinned.unflatten(1, (-1, _BITS)) * weights).sum(-1, dtype=torch.uint8)


def page_votes(votes: torch.Tensor, tokens: int, page_size: int) -> torch.Tensor:
    """Of a prompt's tokens the highest vote in each page; the window's own pages come before all.

    Args:
        votes: float32 [num_kv_heads, n - w].
        tokens: the prompt's, n.

    Returns:
        float32 [num_kv_heads, ceil(n / page_size)].
    """
    pages = -(-tokens // page_size)
    filled = F.pad(votes, (0, pages * page_size - votes.shape[-1]), value=float("inf"))
    return filled.unflatten(-1, (pages, page_size)).amax(-1)
