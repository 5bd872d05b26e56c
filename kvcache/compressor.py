"""The worker's side of compression: evidence of running prompts, compaction, page tables. Knows no vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
import torch.nn.functional as F

from kvcache.allocation import apportion
from kvcache.evidence import HISTORY, POSITIONS, LayerEvidence, PagedEvidence, QuantScales, dequantise, quantise
from kvcache.kept_positions import KeptPositions
from kvcache.merging import Merger
from kvcache.model import UNKNOWN, ModelFacts
from kvcache.observers.base import Observer
from kvcache.observers.window import QueryWindow
from kvcache.orders import Compact, CompactionReport, PendingReport, Start
from kvcache.pages import PageCodec, PageGeometry
from kvcache.plan import RetentionPlan
from kvcache.policies.base import Policy
from kvcache.registry import make_policy
from kvcache.selection import force, keep_top, left_over, ragged
from kvcache.stopwatch import Stopwatch
from kvcache.tables import PageTables, to_device

# Bounds the memory of selection and copy: scores looked at together, about 40 bytes each at most.
_MAX_SCORES = 1 << 23
# Bounds the memory of scoring several layers of an answer together: tokens of all their heads.
_MAX_TOKENS = 1 << 17


@dataclass
class _Request:
    """What stays the same, and what the last compaction left: `counts` int64 [num_layers, num_kv_heads] pages, on the
    CPU; `positions` and `history` [num_layers, num_kv_heads, most], of the kept tokens, a row's own first;
    `tail_history` [num_layers, num_kv_heads, n], of the prompt's tail, which was seen and had no need to compete."""

    policy: Policy
    plan: RetentionPlan
    observers: tuple[Observer, ...]
    slot: int | None = None
    boundary: int = 0
    counts: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    history: torch.Tensor | None = None
    tail_history: torch.Tensor | None = None


@dataclass(frozen=True)
class _Source:
    """What is compacted: `pages` int64 [num_layers, num_kv_heads, width]; by layer, how many `tokens` they hold, and
    how many of them, the first, compete for their places: not the tail of a prompt."""

    pages: torch.Tensor
    tokens: list[int]
    competing: list[int]


class Compressor:
    """Holds what a worker knows of each request that has a policy.

    `start` -> its observers' `record` for each chunk and layer while the prompt runs -> `compact` between two steps ->
    `slot` for every later step -> (`record` and `compact` again, with an interval) -> `finish`. `start` on a known
    request forgets what was known: that is preemption.
    """

    def __init__(
        self,
        geometry: PageGeometry,
        codec: PageCodec,
        pages: torch.Tensor,
        tables: PageTables,
        *,
        scale: float,
        quant: Sequence[QuantScales] = (),
        model: ModelFacts = UNKNOWN,
        keep_positions: bool = False,
    ) -> None:
        """
        Args:
            geometry: how pages are numbered.
            codec: how a page is laid out.
            pages: the whole KV cache, [num_pages, 2 * page_size * head_dim]; compaction writes into it.
            tables: where page tables are kept.
            scale: softmax scale.
            quant: by layer, what queries, keys and values are multiplied with; left out where they aren't quantised.
            model: what else is known of the model; no policy may start that asks for what is missing there.
            keep_positions: remember kept positions per request (`kept_positions`), for tests and `explain`.
        """
        self.geometry, self.codec, self.pages, self.tables = geometry, codec, pages, tables
        self.scale, self.keep_positions = scale, keep_positions
        self.quant = quant or [QuantScales()] * geometry.num_layers
        self.model = replace(model, query_scales=tuple(layer.query for layer in self.quant))
        self.requests: dict[str, _Request] = {}

    def start(self, order: Start) -> None:
        policy = make_policy(order.policy)
        if policy is None:
            raise ValueError(f"request {order.request_id} has no policy to start")
        self.finish(order.request_id)
        observers = policy.observers(self.geometry.num_layers, order.plan.prompt_len, self.model)
        self.requests[order.request_id] = _Request(policy, order.plan, observers)

    def finish(self, request_id: str) -> None:
        """Forget a request; an unknown one is no error."""
        request = self.requests.pop(request_id, None)
        if request and request.slot is not None:
            self.tables.release(request.slot)

    def observers(self, request_id: str) -> tuple[Observer, ...]:
        """What watches the request's prompt; empty where its queries aren't needed (any more)."""
        request = self.requests.get(request_id)
        return request.observers if request else ()

    def evidence(
        self,
        layer: int,
        page_table: torch.Tensor,
        length: int,
        observed: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> PagedEvidence:
        """What the cache has of one layer's first `length` tokens; page_table: int64 [num_kv_heads, n]."""
        return PagedEvidence(
            layer,
            self.pages,
            page_table,
            self.geometry,
            self.codec,
            prompt_len=length,
            raw_queries=observed.get(QueryWindow.name),
            scale=self.scale,
            quant=self.quant[layer],
            observed=observed,
            model=self.model,
        )

    def slot(self, request_id: str) -> int | None:
        """The page table's slot, once the request has been compacted."""
        request = self.requests.get(request_id)
        return request.slot if request else None

    def page_counts(self, request_id: str) -> torch.Tensor:
        """Compacted pages of a compacted request: int64 [num_layers, num_kv_heads], on the CPU."""
        counts = self.requests[request_id].counts
        assert counts is not None
        return counts

    def kept_positions(self, request_id: str) -> list[list[torch.Tensor]]:
        """Kept positions up to the last boundary, less the prompt's tail, ascending, by layer and KV head.

        Only with `keep_positions` or for requests with an interval; empty before the first compaction.
        """
        request = self.requests[request_id]
        if request.positions is None or request.counts is None:
            return []
        lengths = (request.counts * request.plan.page_size).tolist()
        return [
            [row[:length] for row, length in zip(heads, layer, strict=True)]
            for heads, layer in zip(request.positions, lengths, strict=True)
        ]

    def compact(self, order: Compact) -> PendingReport:
        """Score, allocate, select and copy, all layers; blocks that may be shared are only read.

        The GPU is waited for only by allocators that share by the prompt's attention or scores.

        Raises:
            RuntimeError: when an observer has missed queries or the orders don't fit the plan: a bug, never a request's
                fault.
        """
        watch = Stopwatch(self.pages.device)
        request, g = self.requests[order.request_id], self.geometry
        plan, policy = request.plan, request.policy
        for observer in request.observers:
            if observer.missing:
                raise RuntimeError(f"{observer.missing} {observer.name} of request {order.request_id} were not seen")
        blocks = to_device(torch.tensor(order.source_blocks + order.target_blocks), self.pages.device)
        targets = blocks[len(order.source_blocks) :]
        source = self._source(request, order, blocks[: len(order.source_blocks)])
        scores, statistics, memory = self._scores(request, source)
        nan_scores = scores.isnan().sum()
        first = request.slot is None
        if request.slot is None:
            request.counts = self._page_counts(policy, plan, scores, statistics)
            request.slot = self.tables.take(request.counts, targets, plan.full_pages)
        else:
            self.tables.advance(request.slot, order.boundary // plan.page_size)
        assert request.counts is not None
        kept = []
        together = max(1, _MAX_SCORES // scores[0].numel())
        for layers in torch.arange(g.num_layers).split(together):
            begin, end = int(layers[0]), int(layers[-1]) + 1
            part_counts = (request.counts[begin:end] * plan.page_size).flatten()
            chosen = keep_top(self._forced(request, scores, source, begin, end).flatten(0, 1), part_counts)
            self._copy(request.slot, begin, part_counts, chosen, source.pages)
            if policy.merger:
                each = zip(part_counts.split(g.num_kv_heads), chosen.split(g.num_kv_heads), strict=True)
                for layer, (tokens, places) in enumerate(each, begin):
                    self._merge(policy.merger, request.slot, layer, tokens, places, source)
            kept.append(chosen.unflatten(0, (-1, g.num_kv_heads)))
        told = None
        if plan.interval or self.keep_positions or order.bin_tokens:
            stood = self._stood(request, kept, memory)
            if plan.interval or self.keep_positions:
                request.positions = stood
            if order.bin_tokens:
                lengths = to_device(request.counts * plan.page_size, stood.device)
                told = KeptPositions.count(stood, lengths, order.bin_tokens)
        tail = plan.tail if first else 0
        report = CompactionReport(
            order.request_id,
            order.boundary,
            layer_tokens=(request.counts.double().mean(1) * plan.page_size + tail).tolist(),
            tokens_seen=sum(source.tokens) / len(source.tokens),
            blocks_freed=plan.freed_blocks if first else len(order.source_blocks),
            nan_scores=0,
            seconds=0.0,
            positions=told,
        )
        request.boundary = order.boundary
        following = plan.next_boundary(order.boundary)
        request.observers = policy.answer_observers(g.num_layers, order.boundary, following) if following else ()
        return PendingReport(report, nan_scores, watch)

    def _source(self, request: _Request, order: Compact, blocks: torch.Tensor) -> _Source:
        """Check that an order fits the plan, and find what it is about.

        Raises:
            RuntimeError: it doesn't fit.
        """
        plan, layers = request.plan, self.geometry.num_layers
        fits = order.boundary == plan.next_boundary(request.boundary)
        if request.slot is None:
            fits &= blocks.numel() == plan.full_pages + (plan.tail > 0) and len(order.target_blocks) == plan.kept_pages
        else:
            since = order.boundary // plan.page_size - request.boundary // plan.page_size
            fits &= blocks.numel() == since and not order.target_blocks
        if not fits:
            raise RuntimeError(f"{order} doesn't fit the request's plan {plan}, last compacted at {request.boundary}")
        if request.slot is None:
            pages = self.tables.prompt_pages(blocks)
            return _Source(pages, [plan.prompt_len] * layers, [plan.full_pages * plan.page_size] * layers)
        assert request.counts is not None  # heads are equal: requests whose heads differ have no second compaction
        held = [(count + blocks.numel()) * plan.page_size for count in request.counts[:, 0].tolist()]
        return _Source(self.tables.answer_pages(request.slot, request.counts, blocks), held, held)

    def _scores(
        self, request: _Request, source: _Source
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What the policy says of each competing token, float32 [num_layers, num_kv_heads, most]; of each layer, if its
        allocator asks for that, float64 [num_layers], on the CPU; and what it wants to remember of each token."""
        if request.slot is not None and request.policy.heads_alone and len({*source.tokens}) == len({*self.quant}) == 1:
            return self._scores_together(request, source)
        g, policy, most = self.geometry, request.policy, max(source.competing)
        scores = torch.full((g.num_layers, g.num_kv_heads, most), float("-inf"), device=self.pages.device)
        memory, statistics = None, []
        for layer, (tokens, competing) in enumerate(zip(source.tokens, source.competing, strict=True)):
            observed = {observer.name: observer.found(layer) for observer in request.observers}
            if request.slot is not None:
                observed |= self._past(request, slice(layer, layer + 1), tokens)
            pages = source.pages[layer, :, : -(-tokens // g.page_size)]
            evidence = self.evidence(layer, pages, tokens, observed)
            scores[layer, :, :competing] = policy.scores(evidence)[:, :competing]
            if request.slot is None and (statistic := policy.layer_allocator.statistic(evidence)) is not None:
                statistics.append(statistic)
            if request.plan.interval and (carried := policy.carry(evidence)) is not None:
                if memory is None:
                    memory = scores.new_zeros(*scores.shape[:2], max(source.tokens))
                memory[layer, :, :tokens] = carried
        return scores, torch.stack(statistics).double().cpu() if statistics else None, memory

    def _scores_together(self, request: _Request, source: _Source) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        """`_scores` of an answer, some layers at a time as one layer with all their heads."""
        g, policy, tokens = self.geometry, request.policy, source.tokens[0]
        scores, memory = [], []
        together = max(1, _MAX_TOKENS // (g.num_kv_heads * tokens))
        for layers in torch.arange(g.num_layers).split(together):
            chosen = slice(int(layers[0]), int(layers[-1]) + 1)
            content = self.codec.unpack(self.pages[source.pages[chosen].flatten(0, 1)])
            parts = (part.flatten(1, 2)[:, :tokens] for part in content)
            quant = self.quant[0]
            keys, values = (
                dequantise(part, factor) for part, factor in zip(parts, (quant.key, quant.value), strict=True)
            )
            queries = None
            for observer in request.observers:  # windows, where heads stand alone
                found = torch.cat([observer.found(layer) for layer in range(chosen.start, chosen.stop)], 1)
                queries = dequantise(found, quant.query)
            past = self._past(request, chosen, tokens)
            evidence = LayerEvidence(chosen.start, keys, values, queries, self.scale, past)
            scores.append(policy.scores(evidence).unflatten(0, (-1, g.num_kv_heads)))
            if (carried := policy.carry(evidence)) is not None:
                memory.append(carried.unflatten(0, (-1, g.num_kv_heads)))
        return torch.cat(scores), None, torch.cat(memory) if memory else None

    def _past(self, request: _Request, layers: slice, tokens: int) -> dict[str, torch.Tensor]:
        """Where the tokens of layers of equal length stood, and what was remembered of them; layers follow each other
        as heads do."""
        assert request.counts is not None
        kept = int(request.counts[layers.start, 0]) * request.plan.page_size
        past = {POSITIONS: self._positions(request, layers, tokens)}
        if request.history is not None and request.tail_history is not None:
            history = torch.cat([request.history[layers, :, :kept], request.tail_history[layers]], -1).flatten(0, 1)
            past[HISTORY] = F.pad(history, (0, tokens - history.shape[-1]), value=float("nan"))
        return past

    def _positions(self, request: _Request, layers: slice, tokens: int) -> torch.Tensor:
        """Where the tokens of layers of equal length stood: int64 [layers * num_kv_heads, tokens]."""
        size, device = request.plan.page_size, self.pages.device
        if request.positions is None or request.counts is None:
            rows = (layers.stop - layers.start) * self.geometry.num_kv_heads
            return torch.arange(tokens, device=device).expand(rows, -1)
        kept, first = int(request.counts[layers.start, 0]) * size, request.boundary // size * size
        since = torch.arange(first, first + tokens - kept, device=device)
        positions = request.positions[layers, :, :kept].flatten(0, 1)
        return torch.cat([positions, since.expand(len(positions), -1)], -1)

    def _forced(self, request: _Request, scores: torch.Tensor, source: _Source, begin: int, end: int) -> torch.Tensor:
        """Scores of some layers with those of tokens that always stay at infinity."""
        plan, policy = request.plan, request.policy
        assert request.counts is not None
        tail = source.tokens[0] - source.competing[0]
        tokens, (first, last) = request.counts[begin:end] * plan.page_size + tail, plan.question
        recent = policy.recent_of(tokens)
        if isinstance(recent, torch.Tensor):  # a share of what is kept, after all else that is forced
            recent = recent.minimum((tokens - plan.pinned - (last - first)).clamp(min=0))
        if len(set(source.competing[begin:end])) == 1:
            competing = source.competing[begin]
            forced = force(scores[begin:end, :, :competing], plan.pinned, recent - tail)
            if first < last:
                positions = self._positions(request, slice(begin, end), competing).view_as(forced)
                forced.masked_fill_((positions >= first) & (positions < last), float("inf"))
            return F.pad(forced, (0, scores.shape[-1] - competing), value=float("-inf"))
        return torch.cat([self._forced(request, scores, source, i, i + 1) for i in range(begin, end)])

    def _stood(self, request: _Request, kept: list[torch.Tensor], memory: torch.Tensor | None) -> torch.Tensor:
        """Where the kept tokens stood; takes note of what the policy wants to know of them next time."""
        plan = request.plan
        assert request.counts is not None
        most = max(part.shape[-1] for part in kept)
        chosen = torch.cat([F.pad(part, (0, most - part.shape[-1])) for part in kept])
        if memory is not None:
            request.history = memory.gather(-1, chosen.clamp(max=memory.shape[-1] - 1))
            tail = 0 if request.boundary else plan.tail
            request.tail_history = memory[..., memory.shape[-1] - tail :].clone()
        if request.boundary:  # they were numbered by place, kept ones first
            before = (request.counts * plan.page_size).to(chosen.device)[..., None]
            assert request.positions is not None
            old = request.positions.gather(-1, chosen.clamp(max=request.positions.shape[-1] - 1))
            first = request.boundary // plan.page_size * plan.page_size
            chosen = torch.where(chosen < before, old, first + chosen - before)
        return chosen

    def _copy(
        self,
        slot: int,
        first_layer: int,
        part_counts: torch.Tensor,
        positions: torch.Tensor,
        source: torch.Tensor,
    ) -> None:
        """Copy kept tokens into the request's pages, for some layers.

        Args:
            first_layer: the first of these layers.
            part_counts: int64 [rows], tokens of these layers' heads; a row is one (layer, head).
            positions: int64 [rows, most], kept places.
            source: int64 [num_layers, num_kv_heads, width], all layers' pages before it.
        """
        g, size = self.geometry, self.geometry.page_size
        row, rank = ragged(part_counts, self.pages.device)
        position, at = positions[row, rank], row + first_layer * g.num_kv_heads
        page = source.flatten(0, 1)[at, position // size]
        kept = self.tables.token_slots(slot, at, rank)
        self.codec.copy_tokens(self.pages, page * size + position % size, kept)

    def _merge(
        self, merger: Merger, slot: int, layer: int, counts: torch.Tensor, kept: torch.Tensor, source: _Source
    ) -> None:
        """Merge a layer's dropped tokens into the copies of kept ones; an fp8 cache's are quantised anew.

        Args:
            counts: int64 [num_kv_heads], kept tokens, on the CPU.
            kept: int64 [num_kv_heads, most], their positions.
            source: of a first compaction: later ones copy over what would be merged.
        """
        g, n = self.geometry, source.competing[layer]
        evidence = self.evidence(layer, source.pages[layer, :, : n // g.page_size], n)
        dropped = left_over(kept, n, n - int(counts.min()))
        keys, values = merger.merge(evidence.keys, evidence.values, kept, dropped)
        row, rank = ragged(counts, self.pages.device)
        slots, quant = self.tables.token_slots(slot, row + layer * g.num_kv_heads, rank), self.quant[layer]
        new_keys = quantise(keys[row, rank], quant.key, self.pages.dtype)
        new_values = quantise(values[row, rank], quant.value, self.pages.dtype)
        self.codec.write_tokens(self.pages, slots, new_keys, new_values)

    def _page_counts(
        self, policy: Policy, plan: RetentionPlan, scores: torch.Tensor, statistics: torch.Tensor | None
    ) -> torch.Tensor:
        """Whole pages per layer and KV head, int64 [num_layers, num_kv_heads], with the plan's exact sum.

        Args:
            scores: float32 [num_layers, num_kv_heads, n], for allocators that share a layer's tokens over its heads.
            statistics: float64 [num_layers], for allocators that share by the prompt.
        """
        g, heads = self.geometry, policy.head_allocator
        bounds = {"low": plan.min_pages(policy.recent), "high": plan.full_pages}
        if (fixed := heads.pages(plan, bounds["low"])) is not None:
            return fixed
        shares = policy.layer_allocator.shares(g.num_layers, plan.kept_tokens, plan.prompt_len, statistics)
        pages = apportion((shares - plan.tail) / plan.page_size, plan.kept_pages * g.num_layers, **bounds)
        if not heads.needs_scores:
            return pages[:, None].expand(-1, g.num_kv_heads).contiguous()
        forced = [plan.pinned, max(0, policy.recent - plan.tail)]
        wishes = torch.stack(
            [
                heads.shares(force(layer, *forced), int(n) * plan.page_size)
                for layer, n in zip(scores, pages, strict=True)
            ]
        )
        rows = zip(wishes.double().cpu(), (pages * g.num_kv_heads).tolist(), strict=True)
        return torch.stack([apportion(row / plan.page_size, total, **bounds) for row, total in rows])
