"""FULL CUDA graphs for batches with compacted rows, beside vLLM's own."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

from attention_plugins.vllm_adapter.runtime import BatchKind, CompressionRuntime
from attention_plugins.vllm_adapter.selection import Selection

logger = init_logger(__name__)


class SelectionGraphs(ModelCudaGraphManager):
    """Graphs of batches in which a selector is used: no larger than its reader has room for."""

    def __init__(self, most: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for mode, descs in self._capture_descs.items():
            self._capture_descs[mode] = [desc for desc in descs if desc.num_tokens <= most]
        for key, descs in self._candidates.items():
            self._candidates[key] = [desc for desc in descs if desc.num_tokens <= most]


class CompressionGraphs(ModelCudaGraphManager):
    """vLLM's graphs for dense batches, and one more set for each kind of batch that has compacted rows, or a selector.

    A graph fixes which kernels run, so a batch with compacted rows can't use a dense batch's; a dense batch runs
    exactly vLLM's. All sets have the same sizes, those of selectors only small ones. Steps with a prompt in them run in
    piecewise graphs, as in vLLM, whose attention is outside.
    """

    def __init__(self, stock: ModelCudaGraphManager, runtime: CompressionRuntime) -> None:
        """
        Args:
            stock: vLLM's manager, not captured yet; it is replaced by this one.
            runtime: says which kind of batch comes next, and is told which graph runs.
        """
        sizes: dict[str, Any] = {
            "vllm_config": stock.vllm_config,
            "device": stock.device,
            "decode_query_len": stock.decode_query_len,
            "lora_capture_cases": stock.lora_capture_cases,
        }
        super().__init__(cudagraph_mode=stock.cudagraph_mode, **sizes)
        self.runtime = runtime
        self.by_kind: dict[BatchKind | Selection, ModelCudaGraphManager] = {}
        if stock.cudagraph_mode.decode_mode() == CUDAGraphMode.FULL:
            sizes["cudagraph_mode"] = CUDAGraphMode.FULL_DECODE_ONLY
            for kind in (BatchKind.COMPACTED, BatchKind.MIXED):
                self.by_kind[kind] = ModelCudaGraphManager(**sizes)
            for selection, most in runtime.selecting.graphs():
                self.by_kind[selection] = SelectionGraphs(most, **sizes)

    def capture(self, *args: Any, **kwargs: Any) -> None:
        super().capture(*args, **kwargs)
        free = torch.accelerator.get_memory_info()[0]
        for kind, graphs in self.by_kind.items():
            self.runtime.graph = kind
            graphs.capture(*args, **{**kwargs, "progress_bar_desc": f"Capturing CUDA graphs ({kind})"})
        self.runtime.graph = None
        taken = free - torch.accelerator.get_memory_info()[0]
        number = sum(len(graphs.graphs) for graphs in self.by_kind.values())
        logger.info("%d CUDA graphs of compression took %.2f GiB", number, taken / (1 << 30))

    def dispatch(
        self, num_reqs: int, num_tokens: int, uniform_token_count: int | None, num_active_loras: int, **kwargs: Any
    ) -> BatchExecutionDescriptor:
        kind, recording, wanted = self.runtime.kind, self.runtime.recording, self.runtime.wanted
        if recording:  # keeping queries is Python's work, which FULL graphs don't run
            uniform_token_count = None
        elif wanted and (graphs := self.by_kind.get(wanted)):
            desc = graphs.dispatch(num_reqs, num_tokens, uniform_token_count, num_active_loras, **kwargs)
            if desc.cg_mode == CUDAGraphMode.FULL:
                self.runtime.graph = wanted
                return desc
            uniform_token_count = None
        elif kind is not BatchKind.DENSE:
            uniform_token_count = None
        desc = super().dispatch(num_reqs, num_tokens, uniform_token_count, num_active_loras, **kwargs)
        if desc.cg_mode == CUDAGraphMode.FULL and (recording or kind is not BatchKind.DENSE):
            # Only where vLLM was asked for FULL graphs of mixed batches: then such a step runs without a graph.
            return BatchExecutionDescriptor(
                CUDAGraphMode.NONE, num_tokens, num_reqs, num_active_loras=desc.num_active_loras
            )
        return desc

    def run_fullgraph(self, desc: BatchExecutionDescriptor) -> Any:
        graphs = self.by_kind.get(self.runtime.graph) if self.runtime.graph else None
        return graphs.run_fullgraph(desc) if graphs else super().run_fullgraph(desc)

    def release_graphs(self) -> None:
        super().release_graphs()
        for graphs in self.by_kind.values():
            graphs.release_graphs()
