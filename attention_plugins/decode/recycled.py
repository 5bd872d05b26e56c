"""Recycled Attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field

from attention_plugins.decode.base import ListArgs, Place, Reader, Selector, shortest
from attention_plugins.decode.pins import MOST, WINDOW, Pins, prompt_votes
from attention_plugins.decode.rows import DecodeRows, LayerCache, Mode
from attention_plugins.decode.schedule import Read
from kvcache.evidence import LayerEvidence, dequantise
from kvcache.selection import keep_top


class RecycledReader(Reader):
    """By request, layer and KV head the slots of K tokens and the places of pinned ones, by request and layer the
    queries that chose them."""

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
        self.pins = Pins(place, g.num_layers)

    @classmethod
    def nbytes(cls, place: Place) -> int:
        g, width = place.geometry, place.tokens + 1
        by_state = g.num_layers * g.num_kv_heads * 4 * (width + 1 + place.group * g.head_dim)
        by_row = g.num_kv_heads * 4 * width
        return place.states * by_state + place.rows * by_row + Pins.nbytes(place, g.num_layers)

    def prepare(self, pages: torch.Tensor, lengths: torch.Tensor, caches: list[LayerCache], state: int) -> None:
        self.pins.clear(state)

    def open(self, read: Read, pages: torch.Tensor, evidence: Callable[[int], LayerEvidence]) -> None:
        size = self.place.geometry.page_size
        for layer, table in enumerate(pages):
            prompt = evidence(layer)
            heads, n, _ = prompt.shape
            votes = prompt_votes(prompt, 2 * read.pooling + 1)
            self.pins.choose(layer, read.place, votes, read.pinned)
            scores = F.pad(votes, (0, n - votes.shape[-1]), value=float("inf"))  # the window itself is on the list
            places = keep_top(scores, torch.full((heads,), read.tokens))
            slots = table.gather(1, places // size) * size + places % size
            self.slots[layer, read.place, :, : read.tokens] = slots.int()
            self.counts[layer, read.place] = read.tokens
            assert prompt.window_queries is not None
            self.chosen_by[layer, read.place] = prompt.window_queries[-1].flatten().float()

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
            self.pins.raise_scores(pooled, rows, cache.layer)
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

    The prompt's last `window` queries choose the first `tokens` of each KV head, as SnapKV's vote: an answer looks for
    what its question asks for, and the query of one step alone doesn't know that. (A window of 1 is the paper's. With
    0, and over a compressed cache, the first step of the answer reads everything and chooses.) Steps attend to these:
    each new token is added and the one that got least in that step leaves, so the number stays. A full step, every
    `stride` of them, reads everything, attends, and notes anew the tokens that got the highest probability (of a group
    of query heads the strongest counts; the paper's aggregation is not verified); a share `pinned` of the list is kept
    for what the prompt chose, which one step's query may have lost sight of (0 is the paper's). With `similarity` above
    0, every `check_every` steps each layer compares its query with the one that chose, and where their cosine (over all
    heads together) is lower, that layer reads everything and chooses anew. Nothing leaves the cache: the next choice
    sees all tokens again.

    Formula:
        at the prompt's end the window and the K - w others with the highest max over the group and over the window of
        softmax(q k_j / sqrt d); at a full step the pinned K of these with the highest, and the others with the highest
        max over the group of softmax(q k_j / sqrt d).
    """

    name = "recycled"
    title = "Recycled Attention: full attention now and then, its favourites in between"
    paper = "arXiv 2411.05787"
    reader = RecycledReader
    keeps_state = True
    prepares = True

    class Args(ListArgs):
        min_context: int = shortest(12288)
        window: int = Field(
            WINDOW,
            ge=0,
            le=256,
            description="Last queries of the prompt that choose the first list, at most `tokens` / 4; 0: the answer's"
            " first step does.",
        )
        pinned: float = Field(
            MOST, ge=0, le=MOST, description="Share of `tokens` that full steps leave to what these chose."
        )
        stride: int = Field(50, ge=1, le=1 << 20, description="Steps from one full step to the next; 1: all are full.")
        similarity: float = Field(
            0.0, ge=0, le=1, description="Choose anew where a query's cosine to the one that chose is lower; 0: never."
        )
        check_every: int = Field(5, ge=1, le=1 << 20, description="Steps between two such comparisons.")

    args: Args

    @property
    def threshold(self) -> float:
        return self.args.similarity

    @property
    def window(self) -> int:
        return min(self.args.window, self.args.tokens // 4) if self.args.stride > 1 else 0

    @property
    def pinned(self) -> int:
        return int(self.args.tokens * self.args.pinned) if self.window else 0

    def mode(self, context: int, since: int | None) -> Mode:
        if super().mode(context, since) is Mode.DENSE:
            return Mode.DENSE
        if since == 0:
            return Mode.REUSE
        check = Mode.CHECK if self.args.similarity else Mode(0)
        if since is None or since >= self.args.stride:
            return Mode.SELECT | check
        return check if check and since % self.args.check_every == 0 else Mode.REUSE
