"""Tokens that a prompt's last queries chose, kept on a request's lists: one step's query loses sight of them."""

from __future__ import annotations

import torch

from attention_plugins.decode.base import Place
from attention_plugins.decode.rows import DecodeRows, Mode
from kvcache.selection import keep_top

MOST = 0.5
"""Largest share of a list."""
_FIRST = torch.finfo(torch.float32).max


class Pins:
    """Places of pinned tokens, by layer, request and KV head.

    Attributes:
        places: int32 [num_layers, states, num_kv_heads, m], ascending; -1 where nothing is pinned.
    """

    def __init__(self, place: Place) -> None:
        g = place.geometry
        shape = g.num_layers, place.states, g.num_kv_heads, int(place.tokens * MOST)
        self.places = torch.full(shape, -1, dtype=torch.int32, device=place.device)

    @staticmethod
    def nbytes(place: Place) -> int:
        """Memory of `places`."""
        g = place.geometry
        return 4 * g.num_layers * place.states * g.num_kv_heads * int(place.tokens * MOST)

    def clear(self, state: int) -> None:
        """Nothing is pinned of a request that comes to this state, or was compacted, until its prompt chooses."""
        self.places[:, state] = -1

    def choose(self, layer: int, state: int, votes: torch.Tensor, count: int) -> None:
        """Pin the places of the highest votes.

        Args:
            votes: float32 [num_kv_heads, n], no NaN.
            count: how many of each head, or all there are.
        """
        heads, n = votes.shape
        places = keep_top(votes, torch.full((heads,), min(count, n)))
        self.places[layer, state, :, : places.shape[-1]] = places.int()

    def raise_scores(self, scores: torch.Tensor, rows: DecodeRows, layer: int) -> None:
        """Let what is pinned of rows that select come before all others.

        Args:
            scores: float32 [num_kv_heads, columns], not negative, from `rows.starts` on.
        """
        pinned = self.places[layer].index_select(0, rows.places.clamp(min=0).long())
        selects = ((rows.modes & int(Mode.SELECT)) != 0) & (rows.places >= 0)
        real = selects[:, None, None] & (pinned >= 0)
        # What pins nothing adds nothing, to columns that differ: no thousands of writes to one of them.
        spare = torch.arange(pinned[:, 0].numel(), device=pinned.device).view(len(pinned), 1, -1) % scores.shape[1]
        columns = torch.where(real, rows.starts[:, None, None] + pinned, spare)
        first = torch.where(real, _FIRST, 0.0)
        scores.scatter_reduce_(1, columns.transpose(0, 1).flatten(1), first.transpose(0, 1).flatten(1), "amax")
