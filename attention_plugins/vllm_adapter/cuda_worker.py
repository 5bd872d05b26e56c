"""vLLM's GPU worker (Model Runner V2) with compression."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu_worker import Worker

from attention_plugins import kernels
from attention_plugins.decode.base import ReadPages
from attention_plugins.decode.settings import DecodeSettings
from attention_plugins.kernels import prefill as estimators
from attention_plugins.vllm_adapter import cuda_backend
from attention_plugins.vllm_adapter.cuda_backend import FlashPages, StepBuffers
from attention_plugins.vllm_adapter.cuda_graphs import CompressionGraphs
from attention_plugins.vllm_adapter.cuda_prefill import FlashExecutor
from attention_plugins.vllm_adapter.cuda_prefill import nbytes as prefill_bytes
from attention_plugins.vllm_adapter.layers import compressible_layers
from attention_plugins.vllm_adapter.prefilling import Executor
from attention_plugins.vllm_adapter.readers import blocks_beside_readers, place_for, read_calibration
from attention_plugins.vllm_adapter.worker import CompressionWorker, ours
from kvcache.evidence import PagedEvidence, QuantScales
from kvcache.kernels import column_sums, nearest_keys, similar_keys, window_votes
from kvcache.observers.moments import QueryMoments
from kvcache.observers.spectrogram import Spectrogram
from kvcache.pages import InterleavedCodec, PageCodec, PageGeometry
from kvcache.tables import PageTables
from kvcache.vllm_adapter.start_faults import telling

logger = init_logger(__name__)

# A worker's module is imported before its model is built, so the model's layers find our backend.
cuda_backend.register()

WINDOW_TOKENS = 1024
"""Observation-window queries that memory is set aside for, over all prompts in flight."""
GRAPH_BYTES = 2 << 20
"""Memory set aside for one captured graph of ours: an estimate; the log tells what all of them took."""


@telling
class CUDACompressionWorker(CompressionWorker, Worker):
    def page_codec(self, geometry: PageGeometry, dtype: torch.dtype, layer: Any) -> PageCodec:
        return InterleavedCodec(geometry.page_size, geometry.head_dim)

    @property
    def ops(self) -> ModuleType:
        return kernels

    def read_pages(self) -> ReadPages:
        settings, heads = DecodeSettings.of(self.vllm_config.additional_config), self.attention_layers[0].impl
        return FlashPages(self.attention_layers, settings.states * heads.num_kv_heads)

    def executor(self) -> Executor:
        return FlashExecutor(self.attention_layers, kernels, estimators)

    def request_ids(self, common: CommonAttentionMetadata) -> Sequence[str]:
        names = self.model_runner.req_states.index_to_req_id
        return [names[index] for index in common.req_idx.tolist()]

    def quant_scales(self, layer: Any) -> QuantScales:
        if not is_quantized_kv_cache(layer.impl.kv_cache_dtype):
            return QuantScales()
        query = layer._q_scale_float if layer.impl.supports_quant_query_input else 1.0
        return QuantScales(query, layer._k_scale_float, layer._v_scale_float)

    def determine_available_memory(self) -> int:
        """vLLM's, less what we hold beside the KV cache; a size that the user gave stays as it is."""
        if self.cache_config.kv_cache_memory_bytes:
            return super().determine_available_memory()
        available, reserved = super().determine_available_memory(), self.reserved_bytes()
        left = self._left_by_readers(available - reserved)
        gib = 1 << 30
        readers = (available - reserved - left) / gib
        logger.info("KV compression sets %.2f GiB aside, selectors %.2f GiB", reserved / gib, readers)
        return left

    def _left_by_readers(self, available: int) -> int:
        """Memory for the KV cache where selectors hold something beside it, for each page of it too."""
        config = self.vllm_config
        settings, model = DecodeSettings.of(config.additional_config), config.model_config
        if not settings.selectors:
            return available
        layers, heads, kv_heads, head_dim = self._shape()
        page_size = config.cache_config.block_size
        place = place_for(
            settings,
            PageGeometry(tuple(range(layers)), 1, kv_heads, page_size, head_dim),
            num_blocks=0,
            group=heads // kv_heads,
            dtype=model.dtype,
            device=self.device,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_model_len=model.max_model_len,
            calibration=read_calibration(settings, kv_heads),
        )
        itemsize = 1 if is_quantized_kv_cache(config.cache_config.cache_dtype) else model.dtype.itemsize
        block_bytes = layers * kv_heads * page_size * 2 * head_dim * itemsize
        return blocks_beside_readers(settings, place, available, block_bytes) * block_bytes

    def _shape(self) -> tuple[int, int, int, int]:
        """Full-attention layers, and query heads, KV heads and head size of each on this GPU."""
        layers = compressible_layers(self.vllm_config)
        return len(layers), layers[0].num_heads, layers[0].num_kv_heads, layers[0].head_size

    def reserved_bytes(self) -> int:
        """Memory of ours that lives beside the KV cache while the model runs.

        Column sums are counted for one prompt of the greatest length: most prompts are shorter, and several at once
        share it. What compaction itself needs is not counted: it runs between steps, in the memory that vLLM keeps for
        the activations of a full batch.
        """
        config = self.vllm_config
        layers, heads, kv_heads, head_dim = self._shape()
        slots, page_size = config.scheduler_config.max_num_seqs, config.cache_config.block_size
        width = -(-config.model_config.max_model_len // page_size) + 1
        sizes, settings = (
            config.compilation_config.cudagraph_capture_sizes or (),
            DecodeSettings.of(config.additional_config),
        )
        graphs = 2 * len(sizes) + 2 * len(settings.selectors) * sum(size <= settings.states for size in sizes)
        namm = 0
        if ours(config).get("namm_weights"):
            namm = Spectrogram.nbytes(layers, heads, kv_heads, head_dim, config.model_config.max_model_len)
        return (
            PageTables.nbytes(layers, kv_heads, slots, width)
            + StepBuffers.nbytes(slots, kv_heads, width)
            + WINDOW_TOKENS * layers * heads * head_dim * 2
            + 4 * layers * kv_heads * config.model_config.max_model_len
            + QueryMoments.nbytes(layers, heads, head_dim)
            + namm
            + prefill_bytes(
                heads, config.scheduler_config.max_num_batched_tokens, config.model_config.max_model_len, page_size
            )
            + GRAPH_BYTES * graphs
        )

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_from_config(*args, **kwargs)
        runner, tables = self.model_runner, self.runtime.compressor.tables
        slots, width = tables.identity, tables.blocks.shape[1]
        buffers = StepBuffers.make(slots, tables.geometry.num_kv_heads, width, tables.blocks.device)
        for layer in self.attention_layers:
            layer.impl.buffers = buffers
            layer.impl.max_num_splits = self.vllm_config.attention_config.flash_attn_max_num_splits_for_cuda_graph
        for groups in runner.attn_groups:
            for group in groups:
                group.get_metadata_builder(0).buffers = buffers
        runner.cudagraph_manager = CompressionGraphs(runner.cudagraph_manager, self.runtime)

    def compile_or_warm_up_model(self) -> Any:
        """vLLM's, after our kernels have been compiled: the first request must not wait for that."""
        self._warm_up_kernels()
        return super().compile_or_warm_up_model()

    @torch.inference_mode()
    def _warm_up_kernels(self) -> None:
        compressor = self.runtime.compressor
        geometry, layer = compressor.geometry, self.attention_layers[0]
        fp8 = is_quantized_kv_cache(layer.impl.kv_cache_dtype) and layer.impl.supports_quant_query_input
        dtype = torch.float8_e4m3fn if fp8 else self.model_config.dtype
        queries = torch.zeros(8, layer.impl.num_heads, geometry.head_dim, device=self.device).to(dtype)
        evidence = PagedEvidence(
            0,
            compressor.pages,
            torch.zeros(geometry.num_kv_heads, 1, dtype=torch.int64, device=self.device),
            geometry,
            compressor.codec,
            prompt_len=geometry.page_size,
            raw_queries=queries,
            scale=compressor.scale,
            quant=QuantScales(),
        )
        page_size = geometry.page_size
        longest = self.vllm_config.model_config.max_model_len
        self.runtime.selecting.warm_up(-(-longest // page_size))
        self.runtime.prefilling.warm_up(
            ours(self.vllm_config).get("prefill", {}).get("warm_up", ()),
            self.vllm_config.scheduler_config.max_num_batched_tokens,
            longest,
            layer.impl.num_heads,
            dtype,
        )
        window_votes.warm_up(evidence)
        column_sums.warm_up(evidence)
        similar_keys.warm_up(evidence)
        nearest_keys.warm_up(evidence)
