"""vLLM's CPU attention over compressed caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec

from attention_plugins.batch import CompactedBatch
from attention_plugins.page_rows import page_rows
from attention_plugins.vllm_adapter.split import SplitBuilder, SplitImpl, SplitMetadata
from kvcache.tables import PageTables
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


@dataclass(frozen=True)
class CPUPlan:
    """All layers' pages and lengths (see `page_rows`), and the kernel's split of the work by layer."""

    pages: torch.Tensor
    lengths: torch.Tensor
    schedules: list[torch.Tensor]


class CPUCompressedMetadataBuilder(SplitBuilder, CPUAttentionMetadataBuilder):
    def kernel_plan(self, batch: CompactedBatch, tables: PageTables) -> CPUPlan:
        pages, lengths = page_rows(tables, batch.slots, batch.seq_lens, batch.block_table)
        schedules: dict[bytes, torch.Tensor] = {}  # layers of equal lengths share one
        by_layer = []
        for layer_lengths in lengths:
            key = layer_lengths.numpy().tobytes()
            if key not in schedules:
                schedules[key] = ops.cpu_attn_get_scheduler_metadata(
                    num_reqs=layer_lengths.numel(),
                    num_heads=self.num_heads // self.num_kv_heads,
                    num_kv_heads=1,
                    head_dim=self.head_dim,
                    seq_lens=layer_lengths,
                    dtype=self.dtype,
                    query_start_loc=batch.query_start,
                    causal=True,
                    sliding_window_size=-1,
                    isa=self.isa,
                    enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
                    kv_cache_dtype=self.kv_cache_dtype,
                )
            by_layer.append(schedules[key])
        return CPUPlan(pages, lengths, by_layer)


class CPUCompressedImpl(SplitImpl, CPUAttentionBackendImpl):
    def attend(
        self, layer: Any, queries: torch.Tensor, metadata: SplitMetadata, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        batch, plan, index = metadata.compacted, metadata.plan, extract_layer_index(layer.layer_name)
        assert batch is not None
        output = torch.empty_like(queries) if out is None else out
        key_cache, value_cache = self.pages.view(len(self.pages), 1, -1, self.head_size).chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=queries,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=batch.query_start,
            seq_lens=plan.lengths[index],
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=plan.pages[index],
            softcap=self.logits_soft_cap,
            scheduler_metadata=plan.schedules[index],
            s_aux=None,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        return output


def register() -> None:
    """Put the backend in CPU_ATTN's place (the CPU platform asks for no other) and bind our cache spec."""
    register_spec()
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{CPUCompressedBackend.__name__}")
