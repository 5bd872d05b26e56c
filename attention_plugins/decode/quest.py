"""Quest."""

from __future__ import annotations

from typing import Any

import torch

from attention_plugins.decode.base import Place, Reader, Selector, SelectorArgs, shortest
from attention_plugins.decode.rows import DecodeRows, LayerCache, Mode

DENSE_LAYERS = 2
"""First layers that read everything, as in the paper's evaluation."""


class QuestReader(Reader):
    """Smallest and largest element of every page's keys, by channel: a function of the page alone, so it holds for
    whoever shares the page."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        place = self.place
        self.bounds = self.ops.page_bounds(place.num_pages, place.geometry.head_dim, place.device)

    @classmethod
    def nbytes(cls, place: Place) -> int:
        return place.num_pages * 2 * place.geometry.head_dim

    def whole(self, modes: Mode) -> int:
        return int(bool(modes & Mode.DENSE))

    def prepare(self, pages: torch.Tensor, lengths: torch.Tensor, caches: list[LayerCache], state: int) -> None:
        for cache in caches[DENSE_LAYERS:]:
            self.ops.write_bounds(self.bounds, cache, *self.in_use(pages[cache.layer], lengths[cache.layer]))

    def read(self, out: torch.Tensor, queries: torch.Tensor, rows: DecodeRows, cache: LayerCache, whole: int) -> None:
        if cache.layer < DENSE_LAYERS:
            self.read_whole(out, queries, rows, cache, Mode.DENSE | Mode.SELECT)
            return
        scores = self.buffers.scores
        pages, lengths = self.tables(len(rows))
        self.ops.page_scores(scores, self.bounds, rows, cache, queries, Mode.SELECT)
        self.ops.top_pages(pages, lengths, scores, rows, cache, Mode.SELECT)
        if whole or cache.invariant:  # one way, whoever else is in the batch
            self.read_pages(out, queries, pages, lengths, cache)
        else:  # short lists are quicker this way
            most = self.place.tokens + self.place.geometry.page_size
            self.ops.page_attention(out, queries, pages, lengths, rows, cache, Mode.SELECT, most)


class Quest(Selector):
    """Reads the pages whose keys could score highest, by an upper bound from each page's smallest and largest elements.

    The page of the newest tokens is always read, the first two layers read everything. Query heads that share a KV head
    read the same pages: their bounds are added. A page is one of the KV cache's (16 tokens on GPUs). The bounds are
    8-bit floating point (e4m3), rounded to nearest, where the paper's are 16-bit: half the memory, a 32nd of a 16-bit
    cache's at that size, and half the time to read them. Robust where the question changes, since nothing is ever
    dropped; weak where K is a few pages.

    Formula:
        score_p = sum over the group of sum over channels c of max(q_c * min_pc, q_c * max_pc); the newest page and
        the tokens / page - 1 best others are read.
    """

    name = "quest"
    title = "Quest: pages by an upper bound of their keys"
    paper = "arXiv 2406.10774"
    reader = QuestReader
    prepares = True
    keeps_metadata = True

    class Args(SelectorArgs):
        min_context: int = shortest(12288)
