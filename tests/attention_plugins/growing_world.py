"""The CUDA adapter's world with requests that are compacted again and again while they grow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from kvcache.orders import Compact, Start
from kvcache.plan import RetentionPlan
from kvcache.vllm_adapter.orders import StepOrders, attach_orders
from tests.attention_plugins.cuda_world import NULL, PAGE, SCALE, Request, Step, UnevenCompressor, World
from tests.naive_flash import attention


class LayersCompressor(UnevenCompressor):
    """Where answers are compacted too, heads are equal and layers are not: at random, one page at least."""

    def _page_counts(self, policy: Any, plan: RetentionPlan, scores: Any, statistics: Any) -> torch.Tensor:
        if not plan.interval:
            return super()._page_counts(policy, plan, scores, statistics)
        layers, heads = self.geometry.num_layers, self.geometry.num_kv_heads
        owners = torch.arange(layers).repeat_interleave(plan.full_pages - 1)
        chosen = owners[torch.randperm(len(owners))[: (plan.kept_pages - 1) * layers]]
        return (1 + torch.bincount(chosen, minlength=layers))[:, None].expand(-1, heads).contiguous()


@dataclass
class Grower(Request):
    """A request with an interval; `boundary`: where it was compacted last."""

    interval: int = 0
    boundary: int = 0
    compactions: int = 0

    @property
    def plan(self) -> RetentionPlan:
        assert self.kept_pages is not None
        return RetentionPlan(self.prompt_len, PAGE, self.kept_pages, interval=self.interval)

    @property
    def policy(self) -> dict[str, Any]:
        return {**super().policy, "interval": self.interval}

    @property
    def boundaries(self) -> list[int]:
        """Up to 1000."""
        if self.kept_pages is None:
            return []
        whole = self.prompt_len // PAGE * PAGE
        later = range(whole + self.interval, 1000, self.interval) if self.interval else ()
        return [self.prompt_len, *later]

    def watched(self, first: int, last: int) -> tuple[int, int]:
        """Which of these positions are evidence of the next compaction; (0, 0): none.

        The last of a prompt, or of an interval, which may be shorter than the window.
        """
        if not self.window:
            return 0, 0
        for begin, end in zip([0, *self.boundaries], self.boundaries, strict=False):
            wanted = max(first, begin, end - self.window), min(last, end)
            if wanted[0] < wanted[1]:
                return wanted
        return 0, 0


class GrowingWorld(World):
    """Attributes:
    recording: whether the runtime wanted queries of the last step.
    """

    recording = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compressor.__class__ = LayersCompressor

    def add(
        self, name: str, prompt_len: int, kept_pages: int | None = None, window: int = 0, interval: int = 0
    ) -> Grower:
        plain = super().add(name, prompt_len, kept_pages, window)
        grower = Grower(**vars(plain), interval=interval)
        self.requests[name] = grower
        return grower

    def request(self, name: str) -> Grower:
        found = self.requests[name]
        assert isinstance(found, Grower)
        return found

    def expected(self, layer: int, request: Request, first: int, last: int) -> torch.Tensor:
        assert isinstance(request, Grower)
        kept = torch.ones(self.num_kv_heads, last, dtype=torch.bool)
        if request.compacted:
            kept[:, : request.boundary // PAGE * PAGE] = False
            for row, positions in zip(kept, self.compressor.kept_positions(request.name)[layer], strict=True):
                row[positions] = True
        seen = kept[:, None] & (torch.arange(last) <= torch.arange(first, last)[:, None])
        scales = self.scales[layer]
        return attention(
            request.queries[layer, first:last].float() * scales.query,
            request.keys[layer, :, :last].float() * scales.key,
            request.values[layer, :, :last].float() * scales.value,
            seen,
            SCALE,
            self.softcap,
        )

    @contextmanager
    def step(
        self, scheduled: Mapping[str, int], *, finished: Iterable[str] = (), preempted: Iterable[str] = ()
    ) -> Iterator[list[tuple[Request, int, int]]]:
        orders, sources, rows = StepOrders(), list[int](), list[tuple[Request, int, int]]()
        for name in (*finished, *preempted):
            request = self.request(name)
            self._release(request.blocks + request.targets)
            request.blocks, request.targets, request.computed = [], [], 0
            request.compacted, request.boundary = False, 0
        for name in finished:
            self.names.pop(self.requests.pop(name).index)
        for name, tokens in scheduled.items():
            request = self.request(name)
            if request.kept_pages is not None:
                sources += self._orders(request, orders)
                following = [end for end in request.boundaries if end > request.computed]
                assert not following or request.computed + tokens <= following[0], "the scheduler stops at boundaries"
        output = SimpleNamespace(
            finished_req_ids=set(finished),
            preempted_req_ids=set(preempted) or None,
            num_scheduled_tokens=scheduled,
            scheduled_new_reqs=[],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=list(scheduled), num_computed_tokens=[self.requests[name].computed for name in scheduled]
            ),
        )
        attach_orders(output, orders)
        self.runtime.begin_step(output)
        self.recording = self.runtime.recording
        self._release(sources)
        for name, tokens in scheduled.items():
            request = self.request(name)
            first, last = request.computed, request.computed + tokens
            self._allocate(request, last)
            for position in range(first, last):
                content = torch.cat([request.keys[:, :, position], request.values[:, :, position]], dim=-1)
                place = self.cache[:, request.blocks[position // PAGE], :, position % PAGE]
                place.copy_(content.view(torch.uint8) if self.fp8 else content)
            rows.append((request, first, last))
        try:
            yield rows
        finally:
            self.runtime.end_step()
            for each, _, last in rows:
                each.computed = last

    def _orders(self, request: Grower, orders: StepOrders) -> list[int]:
        """What the scheduler orders for a request; the blocks that are then released."""
        if not request.computed:
            orders.start.append(Start(request.name, request.policy, request.plan))
        due = max((end for end in request.boundaries if end <= request.computed), default=0)
        if due == request.boundary:
            return []
        targets = [] if request.boundary else [self.free.pop() for _ in range(request.kept_pages or 0)]
        first, last = request.boundary // PAGE, due // PAGE
        orders.compact.append(Compact(request.name, request.blocks[first : -(-due // PAGE)], targets, due))
        request.targets += targets
        released = request.blocks[first:last]
        request.blocks[first:last] = [NULL] * (last - first)
        request.boundary, request.compacted = due, True
        request.compactions += 1
        return released

    def check(self, step: Step) -> None:
        """Outputs of a step, and whether queries were recorded, which are those that are evidence."""
        compacted = [request.compacted for request, _, _ in step.rows]
        rtol = 2**-8 if self.fp8 else 1e-4
        for layer, (output, dense) in enumerate(zip(step.outputs, step.dense, strict=True)):
            assert (dense is None) == all(compacted), "the dense path runs for dense rows"
            for request, first, last, rows in step.tokens():
                expected = self.expected(layer, request, first, last)
                torch.testing.assert_close(output[rows].float(), expected, rtol=rtol, atol=1e-5)
        wanted = []
        for request, first, last, rows in step.tokens():
            assert isinstance(request, Grower)
            begin, end = request.watched(first, last)
            if begin < end:
                wanted.append((begin, begin - first + rows.start, end - first + rows.start))
        assert self.recording == bool(wanted)
        if self.recording:
            captures = step.metadata.captures
            assert [(capture.position, capture.first, capture.last) for capture in captures] == wanted
