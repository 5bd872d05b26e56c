"""Recycled Attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field

from attention_plugins.decode.base import ListArgs, Place, Reader, Selector, shortest
from attention_plugins.decode.rows import DecodeRows, LayerCache, Mode
from kvcache.evidence import dequantise


class RecycledReader(Reader):
    """By request, layer and KV head the slots of K tokens, and by request and layer the queries that chose them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        place, g = self.place, self.place.geometry

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=place.device)

        width = place.tokens + 1  # one more for the newest, before the least attended goes
        self.slots = zeros(g.num_layers, place.states, g.num_kv_heads, width)
        self.counts = zeros(g.num_layers, place.states, g.num_kv_heads)
        self.chosen_by = zeros(
            g.num_layers, place.states, g.num_kv_heads * place.group * g.head_dim, dtype=torch.float32
        )
        self.logits = zeros(place.rows, g.num_kv_heads, width, dtype=torch.float32)

    @classmethod
    def nbytes(cls, place: Place) -> int:
        g, width = place.geometry, place.tokens + 1
        by_state = g.num_layers * g.num_kv_heads * (4 * width + 4 + 4 * place.group * g.head_dim)
        return place.states * by_state + place.rows * g.num_kv_heads * 4 * width

    def whole(self, modes: Mode) -> int:
        return 2 if modes & Mode.CHECK else 1 if modes & ~Mode.REUSE else 0

    def read(self, out: torch.Tensor, queries: torch.Tensor, rows: DecodeRows, cache: LayerCache, whole: int) -> None:
        slots, counts = self.slots[cache.layer], self.counts[cache.layer]
        if whole:
            rows = self._checked(queries, rows, cache) if whole > 1 else rows
            lse = self.read_whole(out, queries, rows, cache, Mode.DENSE | Mode.SELECT)
            scores, pooled = self.buffers.scores, self.buffers.pooled
            self.ops.token_scores(scores, rows, cache, queries, Mode.SELECT, lse=lse)
            self.ops.pool_scores(pooled, scores, rows, cache, Mode.SELECT)
            self.ops.top_slots(slots, counts, pooled, rows, cache, Mode.SELECT, into=rows.places)
        self.ops.append_newest(slots, counts, rows.places, rows, cache, Mode.REUSE)
        logits = self.logits[: len(rows)]
        self.ops.slot_attention(out, queries, slots, counts, rows.places, rows, cache, Mode.REUSE, logits=logits)
        self.ops.evict_least(slots, counts, rows.places, rows, logits, Mode.REUSE)

    def _checked(self, queries: torch.Tensor, rows: DecodeRows, cache: LayerCache) -> DecodeRows:
        """Decide for this layer what rows in `Mode.CHECK` do: select anew where the query has turned away. Those that
        select anyway leave their query to be compared with."""
        chosen_by = self.chosen_by[cache.layer]
        place = rows.places.clamp(min=0).long()
        now = dequantise(queries, cache.quant.query).flatten(1).float()
        likeness = torch.cosine_similarity(now, chosen_by.index_select(0, place), dim=-1)
        turned = torch.where(likeness < rows.thresholds, int(Mode.SELECT), int(Mode.REUSE)).int()
        modes = torch.where(rows.modes == int(Mode.CHECK), turned, rows.modes)
        selects = ((modes & int(Mode.SELECT)) != 0) & (rows.places >= 0)
        # Rows that don't select write to the last state, which no request has.
        spare = len(chosen_by) - 1
        target = torch.where(selects, place, spare)
        chosen_by.index_copy_(0, target, now)
        return replace(rows, modes=modes)


class Recycled(Selector):
    """Reads everything every `stride` steps, and between that only the tokens that got most then.

    The first step of an answer reads everything, attends, and notes the `tokens` of each KV head that got the highest
    probability (of a group of query heads the strongest counts; the paper's aggregation is not verified). The steps
    after it attend to these: each new token is added and the one that got least in that step leaves, so the number
    stays. With `similarity` above 0, every `check_every` steps each layer compares its query with the one that chose,
    and where their cosine (over all heads together) is lower, that layer reads everything and chooses anew. Nothing
    leaves the cache: the next choice sees all tokens again.

    Formula:
        at a full step the K tokens with the highest max over the group of softmax(q k_j / sqrt d).
    """

    name = "recycled"
    title = "Recycled Attention: full attention now and then, its favourites in between"
    paper = "arXiv 2411.05787"
    reader = RecycledReader
    keeps_state = True

    class Args(ListArgs):
        min_context: int = shortest(12288)
        stride: int = Field(50, ge=1, le=1 << 20, description="Steps from one full step to the next; 1: all are full.")
        similarity: float = Field(
            0.0, ge=0, le=1, description="Choose anew where a query's cosine to the one that chose is lower; 0: never."
        )
        check_every: int = Field(5, ge=1, le=1 << 20, description="Steps between two such comparisons.")

    args: Args

    @property
    def threshold(self) -> float:
        return self.args.similarity

    def mode(self, context: int, since: int | None) -> Mode:
        if super().mode(context, since) is Mode.DENSE:
            return Mode.DENSE
        check = Mode.CHECK if self.args.similarity else Mode(0)
        if since is None or since >= self.args.stride:
            return Mode.SELECT | check
        return check if check and since % self.args.check_every == 0 else Mode.REUSE
