"""The worker's side of compression: evidence of running prompts, compaction, page tables. Knows no vLLM."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from kvcache.allocation import apportion
from kvcache.evidence import LayerEvidence, QueryWindow
from kvcache.pages import PageCodec, PageGeometry, PageTable, TableStore
from kvcache.plan import RetentionPlan
from kvcache.policies.base import Policy
from kvcache.registry import make_policy
from kvcache.selection import force, keep_top


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


@dataclass
class _Request:
    policy: Policy
    plan: RetentionPlan
    window: QueryWindow | None
    table: PageTable | None = None
    kept: list[list[torch.Tensor]] = field(default_factory=list)


class Compressor:
    """Holds what a worker knows of each request that has a policy.

    `start` -> `record` for each chunk and layer while the prompt runs -> `compact` between two steps -> `table` for
    every later step -> `finish`. `start` on a known request forgets what was known: that is preemption.
    """

    def __init__(
        self,
        geometry: PageGeometry,
        codec: PageCodec,
        pages: torch.Tensor,
        *,
        num_heads: int,
        scale: float,
        keep_positions: bool = False,
    ) -> None:
        """
        Args:
            geometry: how pages are numbered.
            codec: how a page is laid out.
            pages: the whole KV cache, [num_pages, 2 * page_size * head_dim]; compaction writes into it.
            num_heads: query heads of a layer.
            scale: softmax scale.
            keep_positions: remember kept positions per request (`kept_positions`), for tests and `explain`.
        """
        self.geometry, self.codec, self.pages = geometry, codec, pages
        self.num_heads, self.scale, self.keep_positions = num_heads, scale, keep_positions
        self.requests: dict[str, _Request] = {}
        self.tables = TableStore(geometry, pages.device)

    def start(self, order: Start) -> None:
        policy = make_policy(order.policy)
        if policy is None:
            raise ValueError(f"request {order.request_id} has no policy to start")
        window = None
        if policy.query_window:
            g = self.geometry
            window = QueryWindow(
                g.num_layers,
                policy.query_window,
                self.num_heads,
                g.head_dim,
                order.plan.prompt_len,
                dtype=self.pages.dtype,
                device=self.pages.device,
            )
        self.finish(order.request_id)
        self.requests[order.request_id] = _Request(policy, order.plan, window)

    def finish(self, request_id: str) -> None:
        """Forget a request; an unknown one is no error."""
        request = self.requests.pop(request_id, None)
        if request and request.table:
            request.table.release()

    def window(self, request_id: str) -> QueryWindow | None:
        """The window that still has to be filled, or None when the request's queries aren't needed (any more)."""
        request = self.requests.get(request_id)
        return request.window if request else None

    def table(self, request_id: str) -> PageTable | None:
        """The page table, once the request has been compacted."""
        request = self.requests.get(request_id)
        return request.table if request else None

    def kept_positions(self, request_id: str) -> list[list[torch.Tensor]]:
        """Kept prompt positions below the tail, ascending, by layer and KV head (only with `keep_positions`)."""
        return self.requests[request_id].kept

    def compact(self, order: Compact) -> CompactionReport:
        """Score, allocate, select and copy, all layers at once; the source blocks are only read.

        Raises:
            RuntimeError: when queries of the window are missing or the orders don't fit the plan: a bug, never a
                request's fault.
        """
        if self.pages.is_cuda:  # selection waits for the GPU in any case; this way only compaction is timed
            torch.cuda.current_stream().synchronize()
        began = time.perf_counter()
        request, g = self.requests[order.request_id], self.geometry
        plan, policy = request.plan, request.policy
        if request.window is not None and request.window.missing:
            raise RuntimeError(f"{request.window.missing} window queries of request {order.request_id} were not seen")
        prompt_blocks = plan.full_pages + (plan.tail > 0)
        if len(order.source_blocks) != prompt_blocks or len(order.target_blocks) != plan.kept_pages:
            raise RuntimeError(f"the blocks of request {order.request_id} don't fit its plan {plan}")
        source = torch.tensor(order.source_blocks, device=self.pages.device)
        target = torch.tensor(order.target_blocks, device=self.pages.device)

        counts = self._page_counts(policy, plan)
        table = PageTable(g, counts, g.pool_of(target), plan.full_pages, self.tables)
        below_tail = plan.full_pages * plan.page_size
        nan_scores = torch.zeros((), dtype=torch.int64, device=self.pages.device)
        request.kept = []
        for layer in range(g.num_layers):
            keys, values = self._read(layer, source)
            queries = request.window.queries[layer] if request.window else None
            prompt_keys, prompt_values = keys[:, : plan.prompt_len], values[:, : plan.prompt_len]
            scores = policy.scores(LayerEvidence(layer, prompt_keys, prompt_values, queries, self.scale))
            nan_scores += scores.isnan().sum()
            scores = force(scores, policy.args.sinks, policy.recent)[:, :below_tail]
            kept = keep_top(scores, (counts[layer] * plan.page_size).tolist())
            heads = torch.arange(g.num_kv_heads).repeat_interleave(counts[layer] * plan.page_size).to(target.device)
            positions, shape = torch.cat(kept), (-1, plan.page_size, g.head_dim)
            packed = self.codec.pack(keys[heads, positions].view(shape), values[heads, positions].view(shape))
            self.pages[table.compacted(layer)] = packed
            if self.keep_positions:
                request.kept.append(kept)
        request.table, request.window = table, None
        tokens = (counts.double().mean(1) * plan.page_size + plan.tail).tolist()
        return CompactionReport(order.request_id, tokens, int(nan_scores), time.perf_counter() - began)

    def _page_counts(self, policy: Policy, plan: RetentionPlan) -> torch.Tensor:
        """Whole pages per layer and KV head, int64 [num_layers, num_kv_heads], with the plan's exact sum."""
        g = self.geometry
        shares = policy.layer_shares(g.num_layers, plan.kept_tokens, plan.prompt_len)
        pages = apportion(
            (shares - plan.tail) / plan.page_size,
            plan.kept_pages * g.num_layers,
            low=plan.min_pages(policy.args.sinks, policy.recent),
            high=plan.full_pages,
        )
        return pages[:, None].expand(-1, g.num_kv_heads).contiguous()

    def _read(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of these blocks: two [num_kv_heads, n * page_size, head_dim]."""
        keys, values = self.codec.unpack(self.pages[self.geometry.pages_of(layer, blocks)])
        return keys.flatten(1, 2), values.flatten(1, 2)
