"""One worker's compression at run time: carries out orders, splits each batch into dense and compacted rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata

from attention_plugins.batch import CompactedRow
from kvcache.compressor import CompactionReport, Compressor
from kvcache.evidence import QueryWindow
from kvcache.vllm_adapter.orders import orders_of

_runtimes: dict[int, CompressionRuntime] = {}


@dataclass(frozen=True)
class Capture:
    """Queries to keep as evidence in this step: batch rows `first ... last - 1` stand at `position` and after."""

    window: QueryWindow
    position: int
    first: int
    last: int


@dataclass
class BatchSplit:
    """What is special about a batch; all empty for a batch that stock vLLM would see."""

    captures: list[Capture] = field(default_factory=list)
    compacted: list[CompactedRow] = field(default_factory=list)
    dense_rows: list[int] = field(default_factory=list)


class CompressionRuntime:
    """Built by the worker once the KV cache exists; found by the attention backend through `runtime_for`."""

    def __init__(
        self, compressor: Compressor, batch_request_ids: Callable[[CommonAttentionMetadata], Sequence[str]]
    ) -> None:
        """`batch_request_ids` names the requests of a batch's rows, in order; each model runner has its own way."""
        self.compressor = compressor
        self._batch_request_ids = batch_request_ids
        self._in_step = False
        self._reports: list[CompactionReport] = []

    @torch.inference_mode()
    def begin_step(self, scheduler_output: Any) -> None:
        """Between steps: forget finished requests, start new ones, compact finished prompts."""
        for request_id in scheduler_output.finished_req_ids:
            self.compressor.finish(request_id)
        for request_id in scheduler_output.preempted_req_ids or ():
            self.compressor.finish(request_id)
        if orders := orders_of(scheduler_output):
            for start in orders.start:
                self.compressor.start(start)
            self._reports += [self.compressor.compact(order) for order in orders.compact]
        self._in_step = True

    def end_step(self) -> None:
        self._in_step = False

    def take_reports(self) -> list[CompactionReport]:
        reports, self._reports = self._reports, []
        return reports

    def split(self, common: CommonAttentionMetadata) -> BatchSplit:
        """Sort the batch's rows; outside a step (profiling, warm-up) every row is dense."""
        split = BatchSplit()
        if not self._in_step or not self.compressor.requests:
            split.dense_rows = list(range(common.num_reqs))
            return split
        starts = common.query_start_loc_cpu.tolist()
        # Exact, since speculative decoding is refused; on a GPU reading `seq_lens` itself would wait for it.
        lengths = common.seq_lens_cpu_upper_bound.tolist()
        page_size = self.compressor.geometry.page_size
        for row, request_id in enumerate(self._batch_request_ids(common)):
            first, last, length = starts[row], starts[row + 1], lengths[row]
            if table := self.compressor.table(request_id):
                last_block = -(-length // page_size)
                if last_block - table.first_block > table.num_appended:
                    table.append(common.block_table_tensor[row, table.first_block : last_block])
                split.compacted.append(CompactedRow(first, last - first, length, table))
                continue
            split.dense_rows.append(row)
            if window := self.compressor.window(request_id):
                position = length - (last - first)
                begin, end = window.overlap(position, length)
                if begin < end:
                    offset = first - position
                    split.captures.append(Capture(window, begin, begin + offset, end + offset))
        return split


def set_runtime(vllm_config: VllmConfig, runtime: CompressionRuntime | None) -> None:
    if runtime is None:
        _runtimes.pop(id(vllm_config), None)
    else:
        _runtimes[id(vllm_config)] = runtime


def runtime_for(vllm_config: VllmConfig) -> CompressionRuntime | None:
    return _runtimes.get(id(vllm_config))
