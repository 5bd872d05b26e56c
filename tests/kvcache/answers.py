"""A request whose answer grows and is compacted at its plan's boundaries, driven as scheduler and worker drive it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from attention_plugins.page_rows import page_rows
from kvcache.compressor import Compressor
from kvcache.evidence import LayerEvidence
from kvcache.orders import Compact, CompactionReport
from kvcache.policies.base import Policy
from tests.kvcache.synthetic import PAGE, PagedCache

Kept = list[list[torch.Tensor]]


@dataclass(frozen=True)
class Compaction:
    """One: all pages before and after it, what it kept, and what the scorer was shown of each layer."""

    boundary: int
    before: torch.Tensor
    after: torch.Tensor
    kept: Kept
    counts: list[list[int]]
    report: CompactionReport
    shown: list[tuple[torch.Tensor, torch.Tensor | None]]
    """Positions and history, by layer."""


@dataclass
class Growing:
    """A request of `cache.prompt_len` tokens that goes on up to `length`.

    Blocks that a compaction has read are released: whatever they held is NaN then, so that reading them shows.
    """

    cache: PagedCache
    order: dict[str, Any]
    name: str = "r"
    compressor: Compressor = field(init=False)
    done: list[Compaction] = field(default_factory=list)
    computed: int = 0
    boundary: int = 0

    def __post_init__(self) -> None:
        self.compressor = self.cache.compressor()
        self.plan = self.cache.start(self.compressor, self.order, self.name)
        self.targets = self.cache.free[: self.plan.kept_pages]
        self._shown: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        scores = self.policy.scores

        def shown(evidence: LayerEvidence) -> torch.Tensor:
            # Layers may come together, as one with all their heads.
            heads, history = self.cache.geometry.num_kv_heads, evidence.history
            positions = evidence.positions.clone().split(heads)
            histories = [None] * len(positions) if history is None else history.split(heads)
            self._shown += zip(positions, histories, strict=True)
            return scores(evidence)

        self.policy.scores = shown  # type: ignore[method-assign]

    @property
    def policy(self) -> Policy:
        return self.compressor.requests[self.name].policy

    @property
    def slot(self) -> int:
        slot = self.compressor.slot(self.name)
        assert slot is not None
        return slot

    def advance(self, length: int, chunk: int = 1) -> None:
        """Compute tokens up to `length`, the prompt at once and its answer (or a suffix) in chunks of this size."""
        while self.computed < length:
            due = self.plan.last_boundary(self.computed)
            if due > self.boundary:
                self.compact(due)
            last = min(length, self.computed + (self.cache.prompt_len if not self.computed else chunk))
            stop = self.plan.next_boundary(self.computed)
            last = last if stop is None else min(last, stop)
            self.cache.write(self.computed, last, self.cache.pages)
            self.cache.feed(self.compressor, [last - self.computed], self.name, first=self.computed)
            self.computed = last

    def compact(self, boundary: int) -> None:
        cache, first = self.cache, self.boundary // PAGE
        source, before = cache.blocks[first : -(-boundary // PAGE)], cache.pages.clone()
        targets = [] if self.boundary else self.targets.tolist()
        self._shown.clear()
        report = self.compressor.compact(Compact(self.name, source.tolist(), targets, boundary)).finish()
        counts = self.compressor.tables.counts[self.slot].tolist()
        kept = [[row.clone() for row in heads] for heads in self.compressor.kept_positions(self.name)]
        after = cache.pages.clone()
        self.done.append(Compaction(boundary, before, after, kept, counts, report, list(self._shown)))
        cache.pages[cache.geometry.pool_of(cache.blocks[first : boundary // PAGE])] = float("nan")
        self.boundary = boundary

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention is given now: pages [L, H, width] and slots in use [L, H], both int32."""
        return page_rows(
            self.compressor.tables,
            torch.tensor([self.slot], dtype=torch.int32, device=self.cache.device),
            torch.tensor([self.computed], dtype=torch.int32, device=self.cache.device),
            self.cache.block_table(self.boundary // PAGE, self.computed),
        )

    def stored(self) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(layer, KV head, positions, keys, values) of all tokens that attention reads now, in their order."""
        pages, lengths = self.rows()
        for layer, heads in enumerate(self.done[-1].kept):
            for head, kept in enumerate(heads):
                length = int(lengths[layer, head])
                own = self.cache.pages[pages[layer, head, : -(-length // PAGE)].long()]
                keys, values = (part.flatten(0, 1)[:length] for part in self.cache.codec.unpack(own))
                later = torch.arange(self.boundary // PAGE * PAGE, self.computed, device=self.cache.device)
                yield layer, head, torch.cat([kept, later]), keys, values


def grown(cache: PagedCache, order: dict[str, Any], length: int, chunk: int = 1) -> Growing:
    """All tokens up to `length` are computed, and it was compacted at every boundary below."""
    request = Growing(cache, order)
    request.advance(length, chunk)
    return request
