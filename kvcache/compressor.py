"""The worker's side of compression: evidence of running prompts, compaction, page tables. Knows no vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from kvcache.allocation import apportion
from kvcache.evidence import PagedEvidence, QuantScales
from kvcache.observers.base import Observer
from kvcache.observers.window import QueryWindow
from kvcache.pages import PageCodec, PageGeometry
from kvcache.plan import RetentionPlan
from kvcache.policies.base import Policy
from kvcache.registry import make_policy
from kvcache.selection import force, keep_top
from kvcache.stopwatch import Stopwatch
from kvcache.tables import PageTables, to_device

# Bounds the memory of selection and copy: scores looked at together, about 40 bytes each at most.
_MAX_SCORES = 1 << 23


@dataclass(frozen=True)
class Start:
    """A request with a policy starts (or starts again after preemption)."""

    request_id: str
    policy: dict[str, Any]
    plan: RetentionPlan


@dataclass(frozen=True)
class Compact:
    """A request's prompt is done: compact its full blocks into the target blocks.

    `source_blocks` are all blocks of the prompt, the partly filled last one too: its keys are evidence.
    """

    request_id: str
    source_blocks: list[int]
    target_blocks: list[int]


@dataclass(frozen=True)
class CompactionReport:
    """What a compaction did. `layer_tokens`: tokens kept per KV head by each layer, the tail included."""

    request_id: str
    layer_tokens: list[float]
    nan_scores: int
    seconds: float


class PendingReport:
    """A compaction whose work may still be running on a GPU."""

    def __init__(self, request_id: str, layer_tokens: list[float], nan_scores: torch.Tensor, watch: Stopwatch) -> None:
        self._request_id, self._layer_tokens, self._watch = request_id, layer_tokens, watch
        # Copied now, in order with the work itself: reading it later would wait for all that is queued by then.
        self._nan_scores = torch.empty_like(nan_scores, device="cpu", pin_memory=nan_scores.is_cuda)
        self._nan_scores.copy_(nan_scores, non_blocking=True)
        watch.stop()

    def finish(self) -> CompactionReport:
        """Wait for the work and tell what it did."""
        seconds = self._watch.seconds()
        return CompactionReport(self._request_id, self._layer_tokens, int(self._nan_scores), seconds)


@dataclass
class _Request:
    policy: Policy
    plan: RetentionPlan
    observers: tuple[Observer, ...]
    slot: int | None = None
    kept: list[list[torch.Tensor]] = field(default_factory=list)


class Compressor:
    """Holds what a worker knows of each request that has a policy.

    `start` -> `record` for each chunk and layer while the prompt runs -> `compact` between two steps -> `slot` for
    every later step -> `finish`. `start` on a known request forgets what was known: that is preemption.
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
            keep_positions: remember kept positions per request (`kept_positions`), for tests and `explain`.
        """
        self.geometry, self.codec, self.pages, self.tables = geometry, codec, pages, tables
        self.scale, self.keep_positions = scale, keep_positions
        self.quant = quant or [QuantScales()] * geometry.num_layers
        self.requests: dict[str, _Request] = {}

    def start(self, order: Start) -> None:
        policy = make_policy(order.policy)
        if policy is None:
            raise ValueError(f"request {order.request_id} has no policy to start")
        self.finish(order.request_id)
        observers = policy.observers(self.geometry.num_layers, order.plan.prompt_len)
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
        self, layer: int, blocks: torch.Tensor, length: int, observed: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> PagedEvidence:
        """What the cache has of one layer's first `length` tokens; `blocks`: int64, on the cache's device."""
        return PagedEvidence(
            layer,
            self.pages,
            blocks,
            self.geometry,
            self.codec,
            prompt_len=length,
            raw_queries=observed.get(QueryWindow.name),
            scale=self.scale,
            quant=self.quant[layer],
            observed=observed,
        )

    def slot(self, request_id: str) -> int | None:
        """The page table's slot, once the request has been compacted."""
        request = self.requests.get(request_id)
        return request.slot if request else None

    def kept_positions(self, request_id: str) -> list[list[torch.Tensor]]:
        """Kept prompt positions below the tail, ascending, by layer and KV head (only with `keep_positions`)."""
        return self.requests[request_id].kept

    def compact(self, order: Compact) -> PendingReport:
        """Score, allocate, select and copy, all layers; the source blocks are only read.

        The GPU is waited for only by allocators that share by the prompt's attention or scores.

        Raises:
            RuntimeError: when queries of the window are missing or the orders don't fit the plan: a bug, never a
                request's fault.
        """
        watch = Stopwatch(self.pages.device)
        request, g = self.requests[order.request_id], self.geometry
        plan, policy = request.plan, request.policy
        if request.slot is not None:
            raise RuntimeError(f"request {order.request_id} is compacted already")
        for observer in request.observers:
            if observer.missing:
                raise RuntimeError(f"{observer.missing} {observer.name} of request {order.request_id} were not seen")
        prompt_blocks = plan.full_pages + (plan.tail > 0)
        if len(order.source_blocks) != prompt_blocks or len(order.target_blocks) != plan.kept_pages:
            raise RuntimeError(f"the blocks of request {order.request_id} don't fit its plan {plan}")
        blocks = to_device(torch.tensor(order.source_blocks + order.target_blocks), self.pages.device)
        source, target = blocks[:prompt_blocks], blocks[prompt_blocks:]

        scores, statistics = self._scores(request, source)
        nan_scores = scores.isnan().sum()
        counts = self._page_counts(policy, plan, scores, statistics)
        slot = self.tables.take(counts, target, plan.full_pages)
        together = max(1, _MAX_SCORES // scores[0].numel())
        for layers in torch.arange(g.num_layers).split(together):
            first, last = int(layers[0]), int(layers[-1]) + 1
            part = force(scores[first:last], policy.args.sinks, max(0, policy.recent - plan.tail))
            part_counts = (counts[first:last] * plan.page_size).flatten()
            positions = keep_top(part.flatten(0, 1), part_counts)
            self._copy(slot, first, part_counts, positions, source)
            if self.keep_positions:
                rows = [row[:count] for row, count in zip(positions, part_counts.tolist(), strict=True)]
                request.kept += [rows[i : i + g.num_kv_heads] for i in range(0, len(rows), g.num_kv_heads)]
        request.slot, request.observers = slot, ()
        tokens = (counts.double().mean(1) * plan.page_size + plan.tail).tolist()
        return PendingReport(order.request_id, tokens, nan_scores, watch)

    def _scores(self, request: _Request, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the policy says of each token below the tail: float32 [num_layers, num_kv_heads, n]; and of each layer:
        float64 [num_layers], on the CPU, if its allocator asks for that."""
        g, plan = self.geometry, request.plan
        request.kept = []
        below_tail = plan.full_pages * plan.page_size
        scores = torch.empty(g.num_layers, g.num_kv_heads, below_tail, device=self.pages.device)
        allocator, statistics = request.policy.layer_allocator, []
        for layer in range(g.num_layers):
            observed = {observer.name: observer.found(layer) for observer in request.observers}
            evidence = self.evidence(layer, source, plan.prompt_len, observed)
            scores[layer] = request.policy.scores(evidence)[:, :below_tail]
            if (statistic := allocator.statistic(evidence)) is not None:
                statistics.append(statistic)
        return scores, torch.stack(statistics).double().cpu() if statistics else None

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
            positions: int64 [rows, most], kept positions.
            source: int64, the prompt's blocks.
        """
        g, device, size = self.geometry, self.pages.device, self.geometry.page_size
        row = torch.arange(len(positions), device=device)
        tokens = to_device(part_counts, device)
        row = row.repeat_interleave(tokens, output_size=int(part_counts.sum()))
        rank = torch.arange(len(row), device=device) - (tokens.cumsum(0) - tokens)[row]
        position, at = positions[row, rank], row + first_layer * g.num_kv_heads
        page = self.tables.layer_base[at // g.num_kv_heads] + at % g.num_kv_heads
        page = page + source[position // size] * g.block_stride
        kept = self.tables.pool_pages(slot, self.tables.starts[slot].flatten()[at] + rank // size)
        self.codec.copy_tokens(self.pages, page * size + position % size, kept * size + rank % size)

    def _page_counts(
        self, policy: Policy, plan: RetentionPlan, scores: torch.Tensor, statistics: torch.Tensor | None
    ) -> torch.Tensor:
        """Whole pages per layer and KV head, int64 [num_layers, num_kv_heads], with the plan's exact sum.

        Args:
            scores: float32 [num_layers, num_kv_heads, n], for allocators that share a layer's tokens over its heads.
            statistics: float64 [num_layers], for allocators that share by the prompt.
        """
        g, heads = self.geometry, policy.head_allocator
        bounds = {"low": plan.min_pages(policy.args.sinks, policy.recent), "high": plan.full_pages}
        if (fixed := heads.pages(plan, bounds["low"])) is not None:
            return fixed
        shares = policy.layer_allocator.shares(g.num_layers, plan.kept_tokens, plan.prompt_len, statistics)
        pages = apportion((shares - plan.tail) / plan.page_size, plan.kept_pages * g.num_layers, **bounds)
        if not heads.needs_scores:
            return pages[:, None].expand(-1, g.num_kv_heads).contiguous()
        forced = [policy.args.sinks, max(0, policy.recent - plan.tail)]
        wishes = torch.stack(
            [
                heads.shares(force(layer, *forced), int(n) * plan.page_size)
                for layer, n in zip(scores, pages, strict=True)
            ]
        )
        rows = zip(wishes.double().cpu(), (pages * g.num_kv_heads).tolist(), strict=True)
        return torch.stack([apportion(row / plan.page_size, total, **bounds) for row, total in rows])
