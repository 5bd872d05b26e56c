"""vLLM's CPU attention over compressed caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    """All layers' pages and lengths (see `page_rows`), the kernel's split of the work by layer, and what makes one."""

    pages: torch.Tensor
    lengths: torch.Tensor
    schedules: list[torch.Tensor]
    schedule: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class CPUCompressedMetadataBuilder(SplitBuilder, CPUAttentionMetadataBuilder):
    def kernel_plan(self, batch: CompactedBatch, tables: PageTables) -> CPUPlan:
        pages, lengths = page_rows(tables, batch.slots, batch.seq_lens, batch.block_table)
        schedules: dict[bytes, torch.Tensor] = {}  # layers of equal lengths share one
        by_layer = []
        for layer_lengths in lengths:
            key = layer_lengths.numpy().tobytes()
            if key not in schedules:
                schedules[key] = self.schedule(layer_lengths, batch.query_start)
            by_layer.append(schedules[key])
        return CPUPlan(pages, lengths, by_layer, self.schedule)

    def schedule(self, lengths: torch.Tensor, query_start: torch.Tensor) -> torch.Tensor:
        """How the kernel splits its work over sequences of one KV head each."""
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=lengths.numel(),
            num_heads=self.num_heads // self.num_kv_heads,
            num_kv_heads=1,
            head_dim=self.head_dim,
            seq_lens=lengths,
            dtype=self.dtype,
            query_start_loc=query_start,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )


class CPUCompressedImpl(SplitImpl, CPUAttentionBackendImpl):
    def attend(
        self, layer: Any, queries: torch.Tensor, metadata: SplitMetadata, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        batch, plan = metadata.compacted, metadata.plan
        assert batch is not None
        output = torch.empty_like(queries) if out is None else out
        lengths, pages = plan.lengths[self.index], plan.pages[self.index]
        if self.sinks is None:
            self._run(queries, output, batch.query_start, lengths, pages, plan.schedules[self.index])
            return output
        # The kernel's sinks are by query head, so each KV head is a call of its own.
        query_lens = batch.query_start.diff()
        heads = torch.arange(self.num_kv_heads).repeat(len(query_lens) // self.num_kv_heads)
        of_token = heads.repeat_interleave(query_lens)
        for head, sinks in enumerate(self.sinks.view(self.num_kv_heads, -1)):
            mine = heads == head
            starts = torch.nn.functional.pad(query_lens[mine].cumsum(0, dtype=torch.int32), (1, 0))
            part, tokens = queries[of_token == head], lengths[mine]
            found = torch.empty_like(part)
            schedule = plan.schedule(tokens, starts)
            self._run(part, found, starts, tokens, pages[mine], schedule, sinks.contiguous())
            output[of_token == head] = found
        return output

    def _run(
        self,
        queries: torch.Tensor,
        output: torch.Tensor,
        query_start: torch.Tensor,
        lengths: torch.Tensor,
        pages: torch.Tensor,
        schedule: torch.Tensor,
        sinks: torch.Tensor | None = None,
    ) -> None:
        key_cache, value_cache = self.pages.view(len(self.pages), 1, -1, self.head_size).chunk(2, dim=2)
        ops.cpu_attention_with_kv_cache(
            query=queries,
            key_cache=key_cache,
            value_cache=value_cache,
            output=output,
            query_start_loc=query_start,
            seq_lens=lengths,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=pages,
            softcap=self.logits_soft_cap,
            scheduler_metadata=schedule,
            s_aux=sinks,
            kv_cache_dtype=self.kv_cache_dtype,
        )


def register() -> None:
    """Put the backend in CPU_ATTN's place (the CPU platform asks for no other) and bind our cache spec."""
    register_spec()
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{CPUCompressedBackend.__name__}")
