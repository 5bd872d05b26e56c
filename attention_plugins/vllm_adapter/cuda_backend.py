"""vLLM's FlashAttention over compressed caches (CUDA). Batches without compacted rows take vLLM's own path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout
from vllm.vllm_flash_attn import flash_attn_varlen_func

from attention_plugins.batch import CompactedBatch, plan_compacted
from attention_plugins.vllm_adapter.runtime import BatchSplit, Capture, record, rows_of, runtime_for
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


@dataclass
class CUDACompressedMetadata:
    """A step's batch, split.

    Attributes:
        dense: vLLM's metadata of the dense rows, or None when there are none.
        dense_tokens: int64, their tokens in the batch; None when that is all tokens.
        compacted: the compacted rows, or None.
        captures: queries to keep.
    """

    dense: FlashAttentionMetadata | None
    dense_tokens: torch.Tensor | None
    compacted: CompactedBatch | None
    captures: list[Capture]


class CUDACompressedMetadataBuilder(FlashAttentionMetadataBuilder):
    # Attention stays outside CUDA graphs (piecewise): which rows are compacted changes from step to step.
    _cudagraph_support = AttentionCGSupport.NEVER
    supports_update_block_table = False

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CUDACompressedMetadata:
        runtime = runtime_for(self.vllm_config)
        split = runtime.split(common_attn_metadata) if runtime else BatchSplit()
        if not split.compacted:
            dense = super().build(common_prefix_len, common_attn_metadata, fast_build)
            return CUDACompressedMetadata(dense, None, None, split.captures)
        dense, tokens = None, None
        if split.dense_rows:
            part, tokens = rows_of(common_attn_metadata, split.dense_rows)
            dense = super().build(common_prefix_len, part, fast_build)
        return CUDACompressedMetadata(dense, tokens, plan_compacted(split.compacted, self.num_heads_kv), split.captures)


class CUDACompressedImpl(FlashAttentionImpl):
    pages: torch.Tensor
    """The whole KV cache, [num_pages, 2 * page_size * head_dim]; set by the worker."""
    page_size: int

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:  # vLLM's profiling run
            return output.fill_(0)
        metadata: CUDACompressedMetadata = attn_metadata
        if metadata.captures:
            record(metadata.captures, extract_layer_index(layer.layer_name), query)
        if metadata.dense is not None:
            tokens = metadata.dense_tokens
            if tokens is None:
                return super().forward(
                    layer, query, key, value, kv_cache, metadata.dense, output, output_scale, output_block_scale
                )
            part = torch.empty_like(output[tokens])
            super().forward(layer, query[tokens], key, value, kv_cache, metadata.dense, part)
            output[tokens] = part
        if metadata.compacted is not None:
            self._compacted(query, metadata.compacted, extract_layer_index(layer.layer_name), output)
        return output

    def _compacted(self, query: torch.Tensor, batch: CompactedBatch, layer: int, output: torch.Tensor) -> None:
        """Each KV head with its own pages and length; its query group is the batch of query heads."""
        group = (-1, self.num_queries_per_kv, self.head_size)
        content = self.pages.view(len(self.pages), self.page_size, 1, 2 * self.head_size)
        part = flash_attn_varlen_func(
            query.reshape(group)[batch.token_heads],
            content[..., : self.head_size],
            content[..., self.head_size :],
            max_seqlen_q=batch.max_query_len,
            cu_seqlens_q=batch.query_start,
            max_seqlen_k=batch.max_length,
            seqused_k=batch.lengths[layer],
            softmax_scale=self.scale,
            causal=True,
            block_table=batch.pages[layer],
            softcap=self.logits_soft_cap,
            fa_version=self.vllm_flash_attn_version,
        )
        output.view(group)[batch.token_heads] = part


def register() -> None:
    """Offer the backend as vLLM's CUSTOM one and bind our cache spec."""
    register_spec()
    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.{CUDACompressedBackend.__name__}")
