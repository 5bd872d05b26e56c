"""The CUDA adapter's world with requests that select what they read, beside dense and compacted ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from attention_plugins.decode.registry import make_selector, selectors
from attention_plugins.decode.rows import LayerCache
from attention_plugins.decode.schedule import Prepare, Read, ReadSchedule
from attention_plugins.decode.settings import DecodeSettings, score_capacity
from attention_plugins.vllm_adapter.readers import make_readers, place_for
from attention_plugins.vllm_adapter.runtime import BatchKind
from attention_plugins.vllm_adapter.selection import Selecting, Selection
from kvcache.vllm_adapter.orders import StepOrders
from tests.attention_plugins.cuda_world import (
    BLOCKS,
    HEAD_DIM,
    LAYERS,
    MAX_LEN,
    MAX_REQS,
    PAGE,
    SCALE,
    Graph,
    Request,
    Step,
    World,
)
from tests.engine import selector_reference as by_hand
from tests.naive_flash import attention

STATES = 6
MOST = 64
"""Of what a request reads; servers have room for more, which only takes time here."""
Reads = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, queries [num_kv_heads, group, d] times the scale, keys [num_kv_heads, n, d]) -> bool [num_kv_heads, n]."""

CASES: dict[str, tuple[dict[str, Any], Callable[[], Reads]]] = {
    "recycled": ({"stride": 4, "tokens": 32, "kernel": 3}, lambda: by_hand.Recycled(32, 4, kernel=3)),
    "recycled-turning": (
        {"stride": 1000, "similarity": 0.05, "check_every": 2, "tokens": 32, "kernel": 1},
        lambda: by_hand.Recycled(32, 1000, 0.05, 2),
    ),
    "tidal": ({"tokens": 32, "kernel": 5, "heads": "own"}, lambda: by_hand.Tidal(32, [1], kernel=5)),
    "tidal-shared": ({"tokens": 32, "kernel": 3}, lambda: by_hand.Tidal(32, [1], kernel=3, shared=True)),
    "lessismore": ({"tokens": 40, "kernel": 1}, lambda: by_hand.LessIsMore(40, [0])),
    "quest": ({"tokens": 40}, lambda: by_hand.Quest(40, PAGE, spread=0.5)),
    "loki": ({"tokens": 32}, lambda: by_hand.Loki(32)),
    "local": ({"tokens": 32, "share": 0.1}, lambda: by_hand.Local(32, 0.1, PAGE)),
}
"""What requests ask for, and what that reads by hand."""
COMPACTED = ["recycled", "quest", "loki"]
"""Cases that compacted requests may be, and each KV head by itself: others need equal heads, or look at all of them."""


class SelectorWorld(World):
    """Attributes:
    reads: what the last step's requests read, those that read everything left out.
    seen: of these, bool [layers, kv_heads, context] by position.
    """

    def __init__(self, backend: ModuleType, patch: Callable[[Any, str, Any], None], ops: ModuleType, **settings: Any):
        super().__init__(backend, patch, **settings)
        asked, compressor = DecodeSettings(tuple(selectors()), STATES), self.compressor
        place = place_for(
            asked,
            compressor.geometry,
            num_blocks=BLOCKS,
            group=self.num_heads // self.num_kv_heads,
            dtype=self.dtype,
            device=self.cache.device,
            max_num_seqs=MAX_REQS,
            max_model_len=MAX_LEN,
            calibration=self._calibration(),
        )
        read_pages = backend.FlashPages(self.layers, STATES * self.num_kv_heads)
        readers = make_readers(asked, replace(place, tokens=MOST), ops, read_pages)
        caches = [
            LayerCache(layer.index, compressor.pages, compressor.geometry, compressor.codec, scales, SCALE)
            for layer, scales in zip(self.layers, self.scales, strict=True)
        ]
        for layer, cache in zip(self.layers, caches, strict=True):
            layer.impl.cache = cache
        self.runtime.selecting = Selecting(compressor, readers, caches)
        capacity = score_capacity(BLOCKS, PAGE, MAX_LEN)
        self.schedule = ReadSchedule(states=STATES, capacity=capacity, page_size=PAGE)
        self.cases: dict[str, str] = {}
        self.by_hand: dict[str, list[Reads]] = {}
        self.reads: dict[str, Read] = {}
        self.seen: dict[str, torch.Tensor] = {}

    def _calibration(self) -> dict[str, torch.Tensor]:
        """Loki with all directions is exact; in bfloat16 only where none is turned. Layer 2 is left to read few."""
        basis = torch.eye(HEAD_DIM).expand(LAYERS, self.num_kv_heads, -1, -1)
        if not self.fp8:
            basis = torch.linalg.qr(torch.randn(basis.shape)).Q
        layers = {"tidal.layers": torch.tensor([1]), "lessismore.layers": torch.tensor([0])}
        return {"loki.basis": basis.contiguous(), **layers}

    def ask(self, name: str, case: str, prompt_len: int, kept_pages: int | None = None) -> Request:
        """A request with a selector."""
        selector = make_selector({"selector": case.split("-")[0], "min_context": 0, **CASES[case][0]})
        assert selector
        self.cases[name] = case
        self.schedule.start(name, selector)
        return self.add(name, prompt_len, kept_pages)

    # What the scheduler says

    def _order(self, orders: StepOrders, request: Request, num_tokens: int) -> list[int]:
        name, before = request.name, request.compacted
        sources = super()._order(orders, request, num_tokens)
        if not request.computed or request.compacted != before:
            self.schedule.forget(name)
            self.by_hand.pop(name, None)
        context, first_block = request.computed + num_tokens, 0
        held = context
        if num_tokens > 1 or context <= request.prompt_len:
            return sources
        if request.compacted:
            first_block = request.plan.full_pages
            held -= (first_block - request.plan.kept_pages) * PAGE
        read = self.schedule.plan(name, context, held)
        if read is None:
            self.by_hand.pop(name, None)
            return sources
        orders.reads[name] = self.reads[name] = read
        if read.prepare:
            blocks = request.blocks[first_block:]
            orders.prepare.append(Prepare(name, read.selector, read.place, blocks, first_block, context - 1))
        return sources

    @contextmanager
    def step(
        self, scheduled: Mapping[str, int], *, finished: Iterable[str] = (), preempted: Iterable[str] = ()
    ) -> Iterator[list[tuple[Request, int, int]]]:
        self.schedule.begin_step()
        self.reads, self.seen = {}, {}
        for name in finished:
            self.schedule.finish(name)
        with super().step(scheduled, finished=finished, preempted=preempted) as rows:
            for request, _, last in rows:
                if request.name in self.reads:
                    self.seen[request.name] = self._seen(request, last)
            yield rows

    # What selectors read by hand

    def _seen(self, request: Request, context: int) -> torch.Tensor:
        """By position. Heads of a compacted request hold different tokens: there each is read by itself."""
        name, heads = request.name, [slice(None)]
        if request.compacted:
            heads = [slice(head, head + 1) for head in range(self.num_kv_heads)]
        if name not in self.by_hand:
            self.by_hand[name] = [CASES[self.cases[name]][1]() for _ in heads]
        seen = torch.zeros(LAYERS, self.num_kv_heads, context, dtype=torch.bool)
        for layer, scales in enumerate(self.scales):
            queries = request.queries[layer, context - 1].float() * (scales.query * SCALE)
            queries = queries.unflatten(0, (self.num_kv_heads, -1))
            for chosen, reads in zip(heads, self.by_hand[name], strict=True):
                held = self._held(request, layer, chosen.start, context)
                keys = request.keys[layer].float()[chosen, held] * scales.key
                found = seen[layer, chosen]
                found[:, held] = reads(layer, queries[chosen], keys)
        return seen

    def _held(self, request: Request, layer: int, head: int | None, context: int) -> torch.Tensor:
        """Positions of a row's tokens, place by place."""
        if not request.compacted:
            return torch.arange(context)
        kept = self.compressor.kept_positions(request.name)[layer][head or 0]
        return torch.cat([kept, torch.arange(request.plan.full_pages * PAGE, context)])

    def expected(self, layer: int, request: Request, first: int, last: int) -> torch.Tensor:
        if request.name not in self.seen:
            return super().expected(layer, request, first, last)
        scales = self.scales[layer]
        return attention(
            request.queries[layer, first:last].float() * scales.query,
            request.keys[layer, :, :last].float() * scales.key,
            request.values[layer, :, :last].float() * scales.value,
            self.seen[request.name][layer, :, None],
            SCALE,
        )

    # Graphs

    def capture(self, kind: BatchKind | Selection, size: int) -> Graph:
        """The forward pass runs at a capture too."""
        graph = super().capture(kind, size)
        for layer, queries, output in zip(self.layers, graph.queries, graph.outputs, strict=True):
            self._forward(layer, queries, graph.metadata, output)
        return graph

    def capture_all(self, selector: str, size: int) -> dict[Any, Graph]:
        """All kinds that steps with this selector may want."""
        kinds: list[BatchKind | Selection] = [BatchKind.COMPACTED, BatchKind.MIXED]
        kinds += [kind for kind, _ in self.runtime.selecting.graphs() if kind.selector == selector]
        return {kind: self.capture(kind, size) for kind in kinds}

    def decode(self, names: Iterable[str], graphs: Mapping[Any, Graph], **others: Any) -> Step:
        """A step of one token for each request, by the graph that it wants; dense ones have none here."""
        with self.step(dict.fromkeys(names, 1), **others) as rows:
            wanted = self.runtime.wanted
            return self.replayed(graphs[wanted], rows) if wanted in graphs else self.ran(rows)
