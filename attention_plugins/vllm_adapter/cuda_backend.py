"""vLLM's FlashAttention over compressed caches (CUDA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.utils.torch_utils import async_tensor_h2d, is_quantized_kv_cache
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout
from vllm.vllm_flash_attn import flash_attn_varlen_func

from attention_plugins.batch import CompactedBatch
from attention_plugins.decode.rows import LayerCache
from attention_plugins.kernels.page_rows import page_rows_into
from attention_plugins.vllm_adapter.cuda_prefill import MULTIPROCESSORS
from attention_plugins.vllm_adapter.runtime import BatchKind, CompressionRuntime, runtime_for
from attention_plugins.vllm_adapter.selection import Selection
from attention_plugins.vllm_adapter.split import SplitBuilder, SplitImpl, SplitMetadata, share_with_sinks
from kvcache.vllm_adapter.manager import compressible, register_spec


class CUDACompressedBackend(FlashAttentionBackend):
    """FlashAttention whose pages may be re-assigned after the prompt."""

    @staticmethod
    def get_name() -> str:
        return AttentionBackendEnum.CUSTOM.name

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return compressible(spec)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Makes the page of one (layer, block, KV head) contiguous.
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return CUDACompressedImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return CUDACompressedMetadataBuilder


@dataclass(frozen=True)
class StepBuffers:
    """Tensors of fixed place that CUDA graphs read and write; every layer uses the same in its turn.

    Attributes:
        slots: int32 [max_num_reqs], written before each step.
        mask: bool [max_num_reqs, 1, 1], which rows are compacted; written before each mixed step.
        dense_lens: int32 [max_num_reqs], lengths of dense rows, 1 for compacted ones; likewise.
        query_start: int32 [max_num_reqs * num_kv_heads + 1]: 0, 1, 2, ..., one query for every sequence.
        pages: int32 [max_num_reqs * num_kv_heads, max_pages].
        lengths: int32 [max_num_reqs * num_kv_heads].
    """

    slots: torch.Tensor
    mask: torch.Tensor
    dense_lens: torch.Tensor
    query_start: torch.Tensor
    pages: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def make(cls, max_num_reqs: int, num_kv_heads: int, max_pages: int, device: torch.device) -> StepBuffers:
        sequences = max_num_reqs * num_kv_heads

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            slots=zeros(max_num_reqs) - 1,
            mask=torch.zeros(max_num_reqs, 1, 1, dtype=torch.bool, device=device),
            dense_lens=zeros(max_num_reqs),
            query_start=torch.arange(sequences + 1, dtype=torch.int32, device=device),
            pages=zeros(sequences, max_pages),
            lengths=zeros(sequences),
        )

    @staticmethod
    def nbytes(max_num_reqs: int, num_kv_heads: int, max_pages: int) -> int:
        return max_num_reqs * (num_kv_heads * (4 * max_pages + 8) + 9) + 4


class CUDACompressedMetadataBuilder(SplitBuilder, FlashAttentionMetadataBuilder):
    supports_update_block_table = False
    hidden_len = 1
    buffers: StepBuffers
    """Set by the worker, on the implementations too."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        runtime = runtime_for(self.vllm_config) if self.ours else None
        if runtime is not None:
            runtime.audit(common_attn_metadata)
        if runtime is not None and isinstance(runtime.graph, Selection):
            rows = runtime.fill_selected(runtime.graph, common_attn_metadata, _send)
            return SplitMetadata(None, selected=[rows])
        if runtime is not None and runtime.graph in (BatchKind.COMPACTED, BatchKind.MIXED):
            return self._build_graph(runtime, common_attn_metadata)
        return super().build(common_prefix_len, common_attn_metadata, fast_build)

    def _build_graph(self, runtime: CompressionRuntime, common: CommonAttentionMetadata) -> SplitMetadata:
        """Fill the buffers that a FULL graph of single-query rows reads; at capture every row is empty."""
        rows, own = common.num_reqs, self.buffers
        slots = own.slots[:rows]
        slots.fill_(-1)
        if runtime.in_step:
            found = runtime.slots(common)
            async_tensor_h2d(found, out=slots[: len(found)])
        dense, mask = None, None
        if runtime.graph is BatchKind.MIXED:
            mask, lens = own.mask[:rows], own.dense_lens[:rows]
            torch.ge(slots[:, None, None], 0, out=mask)
            lens.copy_(common.seq_lens).masked_fill_(mask[:, 0, 0], 1)
            dense = FlashAttentionMetadataBuilder.build(self, 0, replace(common, seq_lens=lens))
        batch = CompactedBatch(
            slots=slots,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            query_start=own.query_start[: rows * self.num_heads_kv + 1],
            max_query_len=1,
            token_heads=None,
        )
        return SplitMetadata(dense, batch, runtime.compressor.tables, mask=mask)


class CUDACompressedImpl(SplitImpl, FlashAttentionImpl):
    buffers: StepBuffers
    max_num_splits: int
    """Most parts that attention over one sequence is split into in a CUDA graph."""

    def attend(
        self, layer: Any, queries: torch.Tensor, metadata: SplitMetadata, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        batch, tables = metadata.compacted, metadata.tables
        assert batch is not None and tables is not None
        sequences = len(batch.query_start) - 1
        pages, lengths = self.buffers.pages[:sequences], self.buffers.lengths[:sequences]
        page_rows_into(pages, lengths, tables, self.index, batch.slots, batch.seq_lens, batch.block_table)
        found = self.flash(
            layer,
            queries,
            pages,
            lengths,
            out=out,
            max_seqlen_q=batch.max_query_len,
            cu_seqlens_q=batch.query_start,
            causal=True,
            num_splits=self._num_splits(sequences, batch.token_heads is None),
            return_softmax_lse=self.sinks is not None,
        )
        if self.sinks is None:
            return found
        # The kernel's sinks are by query head, and here each sequence has query heads of its own.
        places = torch.arange(len(queries), device=queries.device) if batch.token_heads is None else batch.token_heads
        sinks = self.sinks.view(self.num_kv_heads, -1)
        attended, lse = found
        return share_with_sinks(attended, lse, sinks, places % self.num_kv_heads)

    def flash(self, layer: Any, queries: torch.Tensor, pages: torch.Tensor, lengths: torch.Tensor, **rest: Any) -> Any:
        """FlashAttention where each sequence is one KV head of a request: queries [tokens, group, head_dim]."""
        content = self.pages.view(len(self.pages), self.page_size, 1, 2 * self.head_size)
        if is_quantized_kv_cache(self.kv_cache_dtype):
            content = content.view(current_platform.fp8_dtype())
            scales = {"q_descale": layer._q_scale, "k_descale": layer._k_scale, "v_descale": layer._v_scale}
            rest |= {name: scale.expand(len(lengths), 1) for name, scale in scales.items()}
        return flash_attn_varlen_func(
            queries,
            content[..., : self.head_size],
            content[..., self.head_size :],
            max_seqlen_k=pages.shape[1] * self.page_size,
            seqused_k=lengths,
            softmax_scale=self.scale,
            block_table=pages,
            softcap=self.logits_soft_cap,
            fa_version=self.vllm_flash_attn_version,
            **rest,
        )

    def _num_splits(self, sequences: int, in_graph: bool) -> int:
        """How many parts a sequence may be attended in: 0 lets FlashAttention choose, which a graph can't."""
        # From here on every multiprocessor has work, and FlashAttention balances no more than 992 sequences.
        if self.batch_invariant_enabled or sequences > 528:
            return 1
        return self.max_num_splits if in_graph and self.vllm_flash_attn_version == 3 else 0


class FlashPages:
    """FlashAttention over page tables for selectors' readers (`attention_plugins.decode.base.ReadPages`)."""

    def __init__(self, layers: Sequence[Any], most_sequences: int) -> None:
        """
        Args:
            layers: of the model, in order.
            most_sequences: of a step, (request, KV head) pairs.
        """
        self.layers = layers
        device = layers[0].impl.pages.device
        self.query_start = torch.arange(most_sequences + 1, dtype=torch.int32, device=device)

    def __call__(
        self, out: torch.Tensor, queries: torch.Tensor, pages: torch.Tensor, lengths: torch.Tensor, cache: LayerCache
    ) -> torch.Tensor:
        layer, sequences = self.layers[cache.layer], len(lengths)
        _, lse = layer.impl.flash(
            layer,
            queries.flatten(0, 1),
            pages,
            lengths,
            out=out.flatten(0, 1),
            max_seqlen_q=1,
            cu_seqlens_q=self.query_start[: sequences + 1],
            causal=False,  # one query sees all
            num_splits=self._num_splits(layer.impl, sequences),
            return_softmax_lse=True,
        )
        return lse.T.unflatten(0, queries.shape[:2])

    def _num_splits(self, impl: CUDACompressedImpl, sequences: int) -> int:
        """How many parts a sequence is attended in: as many as give every multiprocessor some, the same in and outside
        graphs."""
        if impl.batch_invariant_enabled or impl.vllm_flash_attn_version != 3:
            return 1
        return max(1, min(impl.max_num_splits, 4 * MULTIPROCESSORS // sequences))


def _send(data: np.ndarray, out: torch.Tensor) -> None:
    async_tensor_h2d(data, out=out)


def register() -> None:
    """Offer the backend as vLLM's CUSTOM one and bind our cache spec."""
    register_spec()
    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.{CUDACompressedBackend.__name__}")
