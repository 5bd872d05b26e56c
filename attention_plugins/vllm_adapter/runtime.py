"""One worker's compression at run time: carries out orders, says which rows of a batch are compacted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata

from attention_plugins.prefill.orders import PendingPatternReport
from attention_plugins.vllm_adapter.prefilling import Prefilling, PromptChunk
from attention_plugins.vllm_adapter.selection import SelectedRows, Selecting, Selection
from kvcache.audit import Owned, audit_rows, audit_tables
from kvcache.compressor import Compressor
from kvcache.evidence import LayerEvidence
from kvcache.observers.base import Observer
from kvcache.orders import PendingReport
from kvcache.vllm_adapter.orders import orders_of

_runtimes: dict[int, CompressionRuntime] = {}


class BatchKind(StrEnum):
    """Which rows a batch has; CUDA graphs are captured for each kind."""

    DENSE = "dense"
    COMPACTED = "compacted"
    MIXED = "mixed"
    SELECTED = "selected"
    """Some row selects what it reads, whatever the others are."""
    SPARSE = "sparse"
    """Some row is a prompt's chunk with a pattern, whatever the others are."""


@dataclass(frozen=True)
class Capture:
    """Queries that an observer is to see in this step: batch rows `first ... last - 1` stand at `position` and after.

    `so_far` gives a layer's keys and values up to the end of the chunk that they are part of.
    """

    observer: Observer
    position: int
    first: int
    last: int
    so_far: Callable[[int], LayerEvidence]

    def record(self, layer: int, query: torch.Tensor) -> None:
        """Show the observer one layer's queries; query [num_tokens, num_heads, head_dim] is the whole batch's."""
        self.observer.record(layer, self.position, query[self.first : self.last], lambda: self.so_far(layer))


class CompressionRuntime:
    """Built by the worker once the KV cache exists; found by the attention backend through `runtime_for`.

    Attributes:
        in_step: between `begin_step` and `end_step`; outside (profiling, warm-up) every row is dense.
        kind: which rows the step's batch has.
        recording: whether an observer wants queries of this step.
        wanted: which FULL graph could run the step's batch; None for vLLM's own, or none.
        graph: the one that this step replays or that is being captured; None without one, or with vLLM's own.
        owned: what the step's requests own, where the step is checked (`--kv-audit`).
    """

    def __init__(
        self,
        compressor: Compressor,
        selecting: Selecting,
        prefilling: Prefilling,
        batch_request_ids: Callable[[CommonAttentionMetadata], Sequence[str]],
    ) -> None:
        """`batch_request_ids` names the requests of a batch's rows, in order; each model runner has its own way."""
        self.compressor, self.selecting, self.prefilling = compressor, selecting, prefilling
        self._batch_request_ids = batch_request_ids
        self._reports: list[PendingReport | PendingPatternReport] = []
        self.kind, self.recording = BatchKind.DENSE, False
        self.wanted: BatchKind | Selection | None = None
        self.graph: BatchKind | Selection | None = None
        self.in_step = False
        self.owned: dict[str, Owned] = {}

    @torch.inference_mode()
    def begin_step(self, scheduler_output: Any) -> None:
        """Between steps: forget finished requests, start new ones, compact finished prompts."""
        for request_id in (*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())):
            self.compressor.finish(request_id)
            self.selecting.finish(request_id)
            self.prefilling.finish(request_id)
        if orders := orders_of(scheduler_output):
            for start in orders.start:
                self.compressor.start(start)
            self._reports += [self.compressor.compact(order) for order in orders.compact]
            if orders.owned:
                self.owned = orders.owned
                audit_tables(self.compressor, self.owned)
            self.selecting.reads = orders.reads
            for watch in orders.watch:
                self.selecting.watch(watch)
            for prepare in orders.prepare:
                self.selecting.prepare(prepare)
            for pattern in orders.patterns:
                self.prefilling.start(pattern)
        scheduled, computed = scheduler_output.num_scheduled_tokens, _computed(scheduler_output)
        if self.compressor.requests or self.selecting.windows:
            compacted = sum(self.compressor.slot(name) is not None for name in scheduled)
            self.recording = self._records(computed, scheduled)
            if compacted:
                self.kind = self.wanted = BatchKind.COMPACTED if compacted == len(scheduled) else BatchKind.MIXED
        if self.selecting.reads:
            self.kind, self.wanted = BatchKind.SELECTED, self.selecting.graph(scheduled)
        self.prefilling.begin_step(computed, scheduled, lambda name: self.compressor.slot(name) is not None)
        if self.prefilling.current:  # a chunk of one token could pass for a decode
            self.kind, self.wanted = BatchKind.SPARSE, None
        self.in_step = True

    def _observers(self, request_id: str) -> tuple[Observer, ...]:
        """Whatever watches a request's prompt, or its answer."""
        return *self.compressor.observers(request_id), *self.selecting.windows_of(request_id)

    def _records(self, computed: Mapping[str, int], scheduled: Mapping[str, int]) -> bool:
        """Whether an observer wants queries of this step."""
        for name, tokens in scheduled.items():
            for observer in self._observers(name):
                begin, end = observer.overlap(computed[name], computed[name] + tokens)
                if begin < end:
                    return True
        return False

    def end_step(self) -> None:
        self.in_step = False
        self._reports += self.prefilling.end_step()
        self.kind, self.recording, self.wanted, self.graph = BatchKind.DENSE, False, None, None
        self.selecting.reads, self.owned = {}, {}

    def audit(self, common: CommonAttentionMetadata) -> None:
        """Where the step is checked, compare its block table with what its requests own.

        Raises:
            AuditError: they differ.
        """
        if self.owned:
            audit_rows(self._batch_request_ids(common), common.block_table_tensor, self.owned)

    def take_reports(self) -> list[PendingReport | PendingPatternReport]:
        reports, self._reports = self._reports, []
        return reports

    def slots(self, common: CommonAttentionMetadata) -> np.ndarray:
        """Page table of each of the batch's requests, -1 for those not compacted: int32 [requests]."""
        slot = self.compressor.slot
        names = self._batch_request_ids(common)
        found = (-1 if (at := slot(name)) is None else at for name in names)
        return np.fromiter(found, dtype=np.int32, count=len(names))

    def selected(self, common: CommonAttentionMetadata, slots: np.ndarray) -> tuple[np.ndarray, list[SelectedRows]]:
        """Which of the batch's rows select what they read, bool [requests], and what readers need of them.

        Args:
            slots: see `slots`.
        """
        if not self.selecting.reads:
            return np.zeros(len(slots), dtype=bool), []
        names = self._batch_request_ids(common)
        return self.selecting.mask(names), self.selecting.apart(common, names, slots)

    def planned(self, common: CommonAttentionMetadata) -> tuple[np.ndarray, list[PromptChunk]]:
        """Which of the batch's rows are chunks with a pattern, bool [requests], and what is known of them."""
        if not self.prefilling.current:
            return np.zeros(common.num_reqs, dtype=bool), []
        return self.prefilling.apart(common, self._batch_request_ids(common))

    def fill_selected(
        self, selection: Selection, common: CommonAttentionMetadata, send: Callable[[np.ndarray, torch.Tensor], None]
    ) -> SelectedRows:
        """The rows of a FULL graph; at its capture all are empty."""
        names: Sequence[str] = self._batch_request_ids(common) if self.in_step else ()
        slots = self.slots(common) if self.in_step else np.zeros(0, dtype=np.int32)
        return self.selecting.fill(selection, common, names, slots, send)

    def captures(self, common: CommonAttentionMetadata) -> list[Capture]:
        """Which of the batch's queries are evidence."""
        if not self.recording:
            return []
        found = []
        starts = common.query_start_loc_cpu.tolist()
        # Exact for prompts; on a GPU reading `seq_lens` itself would wait for it.
        lengths = common.seq_lens_cpu_upper_bound.tolist()
        for row, request_id in enumerate(self._batch_request_ids(common)):
            first, length = starts[row], lengths[row]
            position = length - (starts[row + 1] - first)
            for observer in self._observers(request_id):
                begin, end = observer.overlap(position, length)
                if begin < end:
                    places = begin + first - position, end + first - position
                    found.append(Capture(observer, begin, *places, self._so_far(common, row, length)))
        return found

    def _so_far(self, common: CommonAttentionMetadata, row: int, length: int) -> Callable[[int], LayerEvidence]:
        """Of a row that isn't compacted, by layer."""
        blocks = -(-length // self.compressor.geometry.page_size)

        @cache
        def evidence(layer: int) -> LayerEvidence:
            pages = self.compressor.geometry.pages_of(layer, common.block_table_tensor[row, :blocks].long())
            return self.compressor.evidence(layer, pages, length)

        return evidence


def _computed(scheduler_output: Any) -> dict[str, int]:
    """Tokens of each scheduled request before the step."""
    cached = scheduler_output.scheduled_cached_reqs
    computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return computed | {request.req_id: request.num_computed_tokens for request in scheduler_output.scheduled_new_reqs}


def set_runtime(vllm_config: VllmConfig, runtime: CompressionRuntime | None) -> None:
    if runtime is None:
        _runtimes.pop(id(vllm_config), None)
    else:
        _runtimes[id(vllm_config)] = runtime


def runtime_for(vllm_config: VllmConfig) -> CompressionRuntime | None:
    return _runtimes.get(id(vllm_config))
