"""vLLM's FlashAttention over compressed caches (CUDA)."""

from __future__ import annotations

import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout
from vllm.vllm_flash_attn import flash_attn_varlen_func

from attention_plugins.vllm_adapter.split import SplitBuilder, SplitImpl, SplitMetadata
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


class CUDACompressedMetadataBuilder(SplitBuilder, FlashAttentionMetadataBuilder):
    # Attention stays outside CUDA graphs (piecewise): which rows are compacted changes from step to step.
    _cudagraph_support = AttentionCGSupport.NEVER
    supports_update_block_table = False


class CUDACompressedImpl(SplitImpl, FlashAttentionImpl):
    def compacted(self, queries: torch.Tensor, metadata: SplitMetadata, layer: int) -> torch.Tensor:
        batch = metadata.compacted
        assert batch is not None
        content = self.pages.view(len(self.pages), self.page_size, 1, 2 * self.head_size)
        return flash_attn_varlen_func(
            queries,
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


def register() -> None:
    """Offer the backend as vLLM's CUSTOM one and bind our cache spec."""
    register_spec()
    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.{CUDACompressedBackend.__name__}")
