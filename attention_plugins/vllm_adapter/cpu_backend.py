"""vLLM's CPU attention over compressed caches."""

from __future__ import annotations

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec

from attention_plugins.batch import CompactedBatch
from attention_plugins.vllm_adapter.split import SplitBuilder, SplitImpl, SplitMetadata
from kvcache.vllm_adapter.manager import compressible, register_spec


class CPUCompressedBackend(CPUAttentionBackend):
    """CPU_ATTN whose pages may be re-assigned after the prompt."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return compressible(spec)

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return CPUCompressedImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return CPUCompressedMetadataBuilder


class CPUCompressedMetadataBuilder(SplitBuilder, CPUAttentionMetadataBuilder):
    def kernel_plans(self, batch: CompactedBatch) -> list[torch.Tensor]:
        """The CPU kernel's work split by layer; layers of equal lengths share one."""
        plans: dict[bytes, torch.Tensor] = {}
        by_layer = []
        for lengths in batch.lengths:
            key = lengths.numpy().tobytes()
            if key not in plans:
                plans[key] = ops.cpu_attn_get_scheduler_metadata(
                    num_reqs=lengths.numel(),
                    num_heads=self.num_heads // self.num_kv_heads,
                    num_kv_heads=1,
                    head_dim=self.head_dim,
                    seq_lens=lengths,
                    dtype=self.dtype,
                    query_start_loc=batch.query_start,
                    causal=True,
                    sliding_window_size=-1,
                    isa=self.isa,
                    enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
                    kv_cache_dtype=self.kv_cache_dtype,
                )
            by_layer.append(plans[key])
        return by_layer


class CPUCompressedImpl(SplitImpl, CPUAttentionBackendImpl):
    def compacted(self, queries: torch.Tensor, metadata: SplitMetadata, layer: int) -> torch.Tensor:
        batch = metadata.compacted
        assert batch is not None
        output = torch.empty_like(queries)
        key_cache, value_cache = self.pages.view(len(self.pages), 1, -1, self.head_size).chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=queries,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=batch.query_start,
            seq_lens=batch.lengths[layer],
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=batch.pages[layer],
            softcap=self.logits_soft_cap,
            scheduler_metadata=metadata.plans[layer],
            s_aux=None,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return output


def register() -> None:
    """Put the backend in CPU_ATTN's place (the CPU platform asks for no other) and bind our cache spec."""
    register_spec()
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{CPUCompressedBackend.__name__}")
