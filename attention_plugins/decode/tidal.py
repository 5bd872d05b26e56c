"""TidalDecode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field

from attention_plugins.decode.base import ListArgs, Place, Reader, pooled, shortest
from attention_plugins.decode.pins import PinArgs, Pinning, Pins, prompt_votes
from attention_plugins.decode.rows import DecodeRows, LayerCache, Mode
from attention_plugins.decode.schedule import Read
from kvcache.evidence import LayerEvidence
from kvcache.method import Odd

FIRST_SELECTION = 2
"""Layers before it read everything."""
CORRECTION = 13 / 32
"""The correction layer by the model's depth, where it wasn't measured: the paper's 13 of Llama-3-8B's 32."""


def selection_layers(place: Place, name: str) -> tuple[int, ...]:
    """Layers that select for those behind them: measured ones (`longreach calibrate`), else the shipped rule."""
    if f"{name}.layers" in place.calibration:
        return tuple(place.calibration[f"{name}.layers"].tolist())
    layers = place.geometry.num_layers
    return tuple(sorted({min(FIRST_SELECTION, layers - 1), min(round(CORRECTION * layers), layers - 1)}))


class TidalReader(Reader):
    """What one layer has selected, for the layers behind it in the same step."""

    per_head = True
    """Whether each KV head has a list of its own."""

    name = "tidal"
    """Of its layers in the calibration."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        place, g = self.place, self.place.geometry
        self.selecting = selection_layers(place, self.name)
        heads = g.num_kv_heads if self.per_head else 1

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=place.device)

        self.chosen, self.counts = zeros(place.rows, heads, place.tokens), zeros(place.rows, heads)
        self.slots = zeros(place.rows, g.num_kv_heads, place.tokens)
        self.own = torch.arange(place.rows, dtype=torch.int32, device=place.device)
        self.pins = Pins(place, len(self.selecting) if self.per_head else 0)

    @classmethod
    def nbytes(cls, place: Place) -> int:
        g = place.geometry
        heads = g.num_kv_heads if cls.per_head else 1
        pins = Pins.nbytes(place, len(selection_layers(place, cls.name)) if cls.per_head else 0)
        return 4 * place.rows * ((heads + g.num_kv_heads) * place.tokens + heads + 1) + pins

    def prepare(self, pages: torch.Tensor, lengths: torch.Tensor, caches: list[LayerCache], state: int) -> None:
        self.pins.clear(state)

    def open(self, read: Read, pages: torch.Tensor, evidence: Callable[[int], LayerEvidence]) -> None:
        """Pin for each list the tokens that some layer which reads it gives most to."""
        for group, first in enumerate(self.selecting):
            end = [*self.selecting, len(pages)][group + 1]
            most: torch.Tensor | None = None
            for layer in range(min(first + 1, end - 1), end):
                votes = prompt_votes(evidence(layer))
                most = votes if most is None else most.maximum(votes)
            assert most is not None
            if read.threshold:
                most = most.amax(0, keepdim=True).expand_as(most).contiguous()
            self.pins.choose(group, read.place, most, read.pinned)

    def whole(self, modes: Mode) -> int:
        return int(bool(modes & Mode.DENSE))

    def read(self, out: torch.Tensor, queries: torch.Tensor, rows: DecodeRows, cache: LayerCache, whole: int) -> None:
        n = len(rows)
        if cache.layer < self.selecting[0] or cache.layer in self.selecting:
            lse = self.read_whole(out, queries, rows, cache, Mode.DENSE | Mode.SELECT)
            if cache.layer in self.selecting:
                scores, pooled = self.buffers.scores, self.buffers.pooled
                self.ops.token_scores(scores, rows, cache, queries, Mode.SELECT, lse=lse)
                if self.per_head:
                    self.ops.add_heads(scores, rows, cache, Mode.SELECT)
                self.ops.pool_scores(pooled, scores, rows, cache, Mode.SELECT)
                self.select(pooled, rows, cache)
            return
        if whole:
            self.read_whole(out, queries, rows, cache, Mode.DENSE)
        slots, counts, own = self.slots[:n], self.counts[:n], self.own[:n]
        self.ops.place_slots(slots, self.chosen[:n], counts, rows, cache, Mode.SELECT)
        counts = counts.expand(-1, slots.shape[1]).contiguous()
        self.ops.slot_attention(out, queries, slots, counts, own, rows, cache, Mode.SELECT)

    def select(self, scores: torch.Tensor, rows: DecodeRows, cache: LayerCache) -> None:
        """Choose from the layer's scores what the layers behind it read."""
        n = len(rows)
        self.pins.raise_scores(scores, rows, self.selecting.index(cache.layer))
        chosen, counts, own = self.chosen[:n], self.counts[:n], self.own[:n]
        self.ops.top_slots(chosen, counts, scores, rows, cache, Mode.SELECT, into=own, as_places=True)


class Tidal(Pinning):
    """Two layers choose the tokens that all layers behind them read, anew at every step.

    The first two layers read everything, the third as well and chooses; a correction layer does so once more. (With
    `longreach calibrate --selection-layers N`, N measured ones choose: more find more, and cost more.) Of a group of
    query heads the strongest probability counts. What KV heads give is added, so that all of them read one list: the
    third head of one layer has nothing to do with the third of another. With `heads` "own" each has the list of the
    head with its number, as in the paper's code (which keeps one for each query head). The newest token is always among
    the chosen. Scores aren't pooled unless `kernel` says so: in a list of all heads a token's neighbours push out what
    few of them look for. A share `pinned` of a list is kept for what the prompt's last `window` queries chose, as by
    SnapKV's vote, of all layers and heads that read it the one that votes strongest (0 is the paper's, for which the
    two selecting layers of a small model are too few). Four of the model's layers read everything, so the saving has an
    end: a model of 32 layers can't gain more than a factor of eight. Layers have to hold the same tokens, so it goes
    with no policy; with tensor parallel, the heads of one GPU have a list together.

    Formula:
        at layers 2 and c the pinned tokens, and of the others those with the highest sum over KV heads of max over the
        group of softmax(q k_j / sqrt d); pinned are, at the prompt's end, those with the highest max over the layers
        that read the list, heads, window and 21 tokens around j of softmax(q k_j / sqrt d).
    """

    name = "tidal"
    title = "TidalDecode: two layers choose for all"
    paper = "arXiv 2410.05076"
    reader = TidalReader
    with_policies = False

    class Args(PinArgs, ListArgs):
        min_context: int = shortest(8192)
        kernel: Odd = pooled(1)
        heads: Literal["shared", "own"] = Field(
            "shared", description="Whether all KV heads of a layer read one list, or each that of its number."
        )

    args: Args

    @property
    def threshold(self) -> float:
        return float(self.args.heads == "shared")
