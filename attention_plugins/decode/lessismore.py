"""LessIsMore."""

from __future__ import annotations

from dataclasses import replace

import torch

from attention_plugins.decode.base import ListArgs, Place, Selector, shortest
from attention_plugins.decode.rows import DecodeRows, LayerCache, Mode
from attention_plugins.decode.tidal import TidalReader

SINKS = 4
RECENT = 4  # a K-th of K: a quarter of what is read are the last tokens
_LATER = torch.iinfo(torch.int64).max


def shares(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of K tokens, how many the heads choose and how many last ones are read; first ones are taken from the latter.

    Args:
        tokens: int [n], K.

    Returns:
        Chosen and last, int [n] each; with `SINKS` they add up to K.
    """
    chosen = tokens - tokens // RECENT
    return chosen, tokens - chosen - SINKS


def rank_major(places: torch.Tensor, ranks: torch.Tensor, most: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """The union of heads' lists: all heads' first choices, then all second ones, ..., each token once.

    Args:
        places: int64 [n, heads, m], each head's tokens in columns of `taken`.
        ranks: int64 [n, heads, m], how each of them ranks in its head; negative: not a choice.
        most: int64 [n], tokens of the union.
        taken: int64 [columns], scratch.

    Returns:
        int64 [n, m], the union's columns in that order; -1 behind its end.
    """
    _, heads, m = places.shape
    order = ranks * heads + torch.arange(heads, device=places.device)[:, None]
    order = torch.where(ranks >= 0, order, _LATER).flatten(1)
    columns = places.flatten(1)
    taken.fill_(_LATER).scatter_reduce_(0, columns.flatten(), order.flatten(), "amin")
    first = (taken[columns] == order) & (order != _LATER)
    # Two entries of one token never have the same order, so each token is first once.
    best = torch.where(first, order, _LATER).topk(m, dim=-1, largest=False)
    column = columns.gather(1, best.indices)
    within = torch.arange(m, device=places.device) < most[:, None]
    return torch.where(within & (best.values != _LATER), column, -1)


class LessIsMoreReader(TidalReader):
    """As TidalDecode's, with one list for all heads."""

    name = "lessismore"
    per_head = False

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        place, heads = self.place, self.place.geometry.num_kv_heads
        device = place.device
        self.lists = torch.zeros(place.rows, heads, place.tokens, dtype=torch.int32, device=device)
        self.list_counts = torch.zeros(place.rows, heads, dtype=torch.int32, device=device)
        self.taken = torch.zeros(place.capacity + 1, dtype=torch.int64, device=device)
        self.near = torch.arange(place.tokens // RECENT + SINKS, device=device)

    @classmethod
    def nbytes(cls, place: Place) -> int:
        lists = 4 * place.rows * place.geometry.num_kv_heads * (place.tokens + 1)
        return super().nbytes(place) + lists + 8 * (place.capacity + 1 + place.tokens // RECENT + SINKS)

    def select(self, scores: torch.Tensor, rows: DecodeRows, cache: LayerCache) -> None:
        n, device = len(rows), self.place.device
        chosen, last = shares(rows.tokens.long())
        length, start = rows.seq_lens.long(), rows.starts.long()
        selects = rows.modes == int(Mode.SELECT)
        # First and last tokens are read anyway: heads choose among the others.
        near = self.near[None, :]
        behind = near - SINKS
        place = torch.where(near < SINKS, near, length[:, None] - 1 - behind)
        forced = selects[:, None] & ((near < SINKS) | (behind < last[:, None]))
        spare = scores.shape[1] - 1
        columns = torch.where(forced, start[:, None] + place, spare).flatten()
        scores.index_fill_(1, columns, float("-inf"))

        lists, counts = self.lists[:n], self.list_counts[:n]
        wider = replace(rows, tokens=(chosen + 1).int())  # the newest is always on a list, and none of ours
        own = self.own[:n]
        self.ops.top_slots(lists, counts, scores, wider, cache, Mode.SELECT, into=own, as_places=True)
        column = start[:, None, None] + lists
        width = lists.shape[-1]
        heads = torch.arange(lists.shape[1], device=device)[:, None]
        listed = torch.arange(width, device=device) < counts[..., None]
        listed &= selects[:, None, None]
        score = torch.where(listed, scores[heads, torch.where(listed, column, spare)], float("-inf"))
        by_rank = score.sort(dim=-1, descending=True, stable=True)
        ranked = column.gather(-1, by_rank.indices)
        rank = torch.arange(width, device=device).expand_as(ranked)
        real = by_rank.values > float("-inf")
        union = rank_major(
            torch.where(real, ranked, self.place.capacity), torch.where(real, rank, -1), chosen, self.taken
        )
        union = torch.where(union < 0, -1, union - start[:, None])
        self._write(union, chosen, last, length)

    def _write(self, union: torch.Tensor, chosen: torch.Tensor, last: torch.Tensor, length: torch.Tensor) -> None:
        """First tokens, last tokens, then the union, as every head's list."""
        n = len(union)
        index = torch.arange(self.chosen.shape[-1], device=union.device)[None, :]
        place = torch.where(index < SINKS, index, length[:, None] - 1 - (index - SINKS))
        at = index - SINKS - last[:, None]
        from_union = union.gather(1, at.clamp(0, union.shape[1] - 1))
        place = torch.where(at >= 0, from_union, place)
        self.chosen[:n, 0].copy_(place)
        found = (union >= 0).sum(-1)
        self.counts[:n, 0].copy_(SINKS + last + torch.minimum(found, chosen))


class LessIsMore(Selector):
    """As TidalDecode, but all heads read one list, and a quarter of it are the last tokens. Made for long reasoning.

    At the layers that choose, each KV head ranks the tokens; the list takes all heads' first choices, then their
    second ones, and so on, each token once, until three quarters of `tokens` are there. Four first tokens and the last
    ones fill the rest. The paper's code ranks by query head; here the strongest of a group counts. All heads have to
    agree, so it isn't for tensor parallel, and goes with no policy.

    Formula:
        sinks + last + first m of (rank 1 of head 0, rank 1 of head 1, ..., rank 2 of head 0, ...).
    """

    name = "lessismore"
    title = "LessIsMore: one list for all heads"
    paper = "arXiv 2508.07101"
    reader = LessIsMoreReader
    with_policies = False
    with_tensor_parallel = False

    class Args(ListArgs):
        min_context: int = shortest(24576)
