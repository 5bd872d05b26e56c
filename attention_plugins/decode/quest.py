"""Quest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field

from attention_plugins.decode.base import Place, Reader, shortest
from attention_plugins.decode.pins import PinArgs, PinnedPages, Pinning, page_votes, prompt_votes
from attention_plugins.decode.rows import DecodeRows, LayerCache, Mode
from attention_plugins.decode.schedule import Read
from kvcache.evidence import LayerEvidence

DENSE_LAYERS = 2
"""First layers that read everything, as in the paper's evaluation."""


class QuestReader(Reader):
    """Smallest and largest element of every page's keys, by channel: a function of the page alone, so it holds for
    whoever shares the page. By request, layer and KV head which pages are pinned."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        place = self.place
        self.bounds = self.ops.page_bounds(place.num_pages, place.geometry.head_dim, place.device)
        self.pins = PinnedPages(place)

    @classmethod
    def nbytes(cls, place: Place) -> int:
        return place.num_pages * 2 * place.geometry.head_dim + PinnedPages.nbytes(place)

    def whole(self, modes: Mode) -> int:
        return int(bool(modes & Mode.DENSE))

    def prepare(self, pages: torch.Tensor, lengths: torch.Tensor, caches: list[LayerCache], state: int) -> None:
        self.pins.clear(state)
        for cache in caches[DENSE_LAYERS:]:
            self.ops.write_bounds(self.bounds, cache, *self.in_use(pages[cache.layer], lengths[cache.layer]))

    def open(self, read: Read, pages: torch.Tensor, evidence: Callable[[int], LayerEvidence]) -> None:
        size = self.place.geometry.page_size
        for layer in range(DENSE_LAYERS, len(pages)):
            prompt = evidence(layer)
            votes = page_votes(prompt_votes(prompt), prompt.shape[1], size)
            self.pins.choose(layer, read.place, votes, read.pinned // size)

    def read(self, out: torch.Tensor, queries: torch.Tensor, rows: DecodeRows, cache: LayerCache, whole: int) -> None:
        if cache.layer < DENSE_LAYERS:
            self.read_whole(out, queries, rows, cache, Mode.DENSE | Mode.SELECT)
            return
        scores = self.buffers.scores
        pages, lengths = self.tables(len(rows))
        self.ops.page_scores(scores, self.bounds, rows, cache, queries, Mode.SELECT, pins=self.pins.bits[cache.layer])
        self.ops.top_pages(pages, lengths, scores, rows, cache, Mode.SELECT)
        if whole or cache.invariant:  # one way, whoever else is in the batch
            self.read_pages(out, queries, pages, lengths, cache)
        else:  # short lists are quicker this way
            most = self.place.tokens + self.place.geometry.page_size
            self.ops.page_attention(out, queries, pages, lengths, rows, cache, Mode.SELECT, most)


class Quest(Pinning):
    """Reads the pages whose keys seem to score highest, by each page's smallest and largest elements.

    The paper takes the most that a key between these could score. Keys turn with their position, so that a page's fast
    channels are wide whatever is in it, and never all at their ends: a share `spread` of the width says more about the
    page's best key (1 is the paper's bound). A share `pinned` of what is read is kept for the pages that the prompt's
    last `window` queries chose by their keys, as by SnapKV's vote (0 is the paper's). The page of the newest tokens is
    always read, the first two layers read everything. Query heads that share a KV head read the same pages: their
    scores are added. A page is one of the KV cache's (16 tokens on GPUs). Smallest and largest elements are 8-bit
    floating point (e4m3), rounded to nearest, where the paper's are 16-bit: half the memory, a 32nd of a 16-bit cache's
    at that size, and half the time to read them. Nothing is ever dropped, so it is robust where the question changes;
    weak where K is a few pages.

    Formula:
        score_p = sum over the group of sum over channels c of q_c (max_pc + min_pc) / 2 + spread |q_c| (max_pc -
        min_pc) / 2, which with a spread of 1 is max(q_c min_pc, q_c max_pc); the newest page, the pinned ones and the
        best others are read, tokens / page in all; pinned are, at the prompt's end, the window's pages and those with
        the highest max over the group, the window and 21 tokens around each of the page's of softmax(q k_j / sqrt d).
    """

    name = "quest"
    title = "Quest: pages by an upper bound of their keys"
    paper = "arXiv 2406.10774"
    reader = QuestReader
    keeps_metadata = True

    class Args(PinArgs):
        min_context: int = shortest(12288)
        pinned: float = Field(
            0.75, ge=0, le=0.75, description="Share of `tokens` that is kept for what these chose, in whole pages."
        )
        spread: float = Field(
            0.5,
            ge=0,
            le=1,
            description="How much of the width of a page's bounds counts; 1: the paper's bound, 0: the middle alone.",
        )

    args: Args

    @property
    def threshold(self) -> float:
        return self.args.spread
