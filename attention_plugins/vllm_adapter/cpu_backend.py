"""vLLM's CPU attention over compressed caches. Dense batches take vLLM's own path, untouched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import AttentionSpec

from attention_plugins.batch import CompactedBatch, plan_compacted
from attention_plugins.vllm_adapter.runtime import BatchSplit, Capture, record, rows_of, runtime_for
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


@dataclass
class CPUCompressedMetadata:
    """A step's batch, split.

    Attributes:
        dense: vLLM's metadata of the dense rows, or None when there are none.
        dense_tokens: int64, their tokens in the batch; None when that is all tokens.
        compacted: the compacted rows, or None.
        plans: vLLM's kernel plan of the compacted rows for each layer.
        captures: queries to keep.
    """

    dense: CPUAttentionMetadata | None
    dense_tokens: torch.Tensor | None
    compacted: CompactedBatch | None
    plans: list[torch.Tensor]
    captures: list[Capture]


class CPUCompressedMetadataBuilder(CPUAttentionMetadataBuilder):
    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUCompressedMetadata:
        runtime = runtime_for(self.vllm_config)
        split = runtime.split(common_attn_metadata) if runtime else BatchSplit()
        if not split.compacted:
            dense = super().build(common_prefix_len, common_attn_metadata, fast_build)
            return CPUCompressedMetadata(dense, None, None, [], split.captures)
        dense, tokens = None, None
        if split.dense_rows:
            part, tokens = rows_of(common_attn_metadata, split.dense_rows)
            dense = super().build(common_prefix_len, part, fast_build)
        compacted = plan_compacted(split.compacted, self.num_kv_heads)
        return CPUCompressedMetadata(dense, tokens, compacted, self._kernel_plans(compacted), split.captures)

    def _kernel_plans(self, batch: CompactedBatch) -> list[torch.Tensor]:
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


class CPUCompressedImpl(CPUAttentionBackendImpl):
    pages: torch.Tensor
    """The whole KV cache, [num_pages, 2 * page_size * head_dim]; set by the worker."""

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:  # vLLM's warm-up
            return output
        metadata: CPUCompressedMetadata = attn_metadata
        index = extract_layer_index(layer.layer_name)
        record(metadata.captures, index, query)
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
            self._compacted(query, metadata.compacted, metadata.plans[index], index, output)
        return output

    def _compacted(
        self, query: torch.Tensor, batch: CompactedBatch, plan: torch.Tensor, layer: int, output: torch.Tensor
    ) -> None:
        """Each KV head with its own pages and length; its query group is the batch of query heads."""
        group = (-1, self.num_queries_per_kv, self.head_size)
        queries = query.reshape(group)[batch.token_heads]
        part = torch.empty_like(queries)
        key_cache, value_cache = self.pages.view(len(self.pages), 1, -1, self.head_size).chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=queries,
            key_cache=key_cache,
            value_cache=value_cache,
            output=part,
            query_start_loc=batch.query_start,
            seq_lens=batch.lengths[layer],
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=batch.pages[layer],
            softcap=self.logits_soft_cap,
            scheduler_metadata=plan,
            s_aux=None,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        output.view(group)[batch.token_heads] = part


def register() -> None:
    """Put the backend in CPU_ATTN's place (the CPU platform asks for no other) and bind our cache spec."""
    register_spec()
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{CPUCompressedBackend.__name__}")
