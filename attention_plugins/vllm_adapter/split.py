"""A backend's batch in two parts: dense rows take vLLM's own path, compacted rows ours. Mix-ins for any backend."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder, CommonAttentionMetadata

from attention_plugins.batch import CompactedBatch, plan_compacted
from attention_plugins.vllm_adapter.runtime import BatchSplit, Capture, runtime_for


@dataclass
class SplitMetadata:
    """A step's batch, split.

    Attributes:
        dense: the backend's own metadata of the dense rows, or None when there are none.
        dense_tokens: int64, their tokens in the batch; None when that is all tokens.
        compacted: the compacted rows, or None.
        plans: the kernel's plan of the compacted rows for each layer, for kernels that want one.
        captures: queries to keep.
    """

    dense: Any
    dense_tokens: torch.Tensor | None
    compacted: CompactedBatch | None
    plans: list[torch.Tensor]
    captures: list[Capture]


class SplitBuilder(AttentionMetadataBuilder if TYPE_CHECKING else object):  # type: ignore[misc]
    """In front of a backend's metadata builder."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SplitMetadata:
        runtime = runtime_for(self.vllm_config)
        split = runtime.split(common_attn_metadata) if runtime else BatchSplit()
        if not split.compacted:
            dense = super().build(common_prefix_len, common_attn_metadata, fast_build)
            return SplitMetadata(dense, None, None, [], split.captures)
        dense, tokens = None, None
        if split.dense_rows:
            part, tokens = _rows_of(common_attn_metadata, split.dense_rows)
            dense = super().build(common_prefix_len, part, fast_build)
        compacted = plan_compacted(split.compacted, self.kv_cache_spec.num_kv_heads)
        return SplitMetadata(dense, tokens, compacted, self.kernel_plans(compacted), split.captures)

    def kernel_plans(self, batch: CompactedBatch) -> list[torch.Tensor]:
        """Plans of the compacted rows by layer; none unless the kernel wants them."""
        return []


class SplitImpl(AttentionImpl if TYPE_CHECKING else object):  # type: ignore[misc]
    """In front of a backend's implementation, which adds `compacted`."""

    pages: torch.Tensor
    """The whole KV cache, [num_pages, 2 * page_size * head_dim]; set by the worker, as is `page_size`."""
    page_size: int

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:  # vLLM's warm-up and profiling runs
            return super().forward(layer, query, key, value, kv_cache, None, output)
        metadata: SplitMetadata = attn_metadata
        if metadata.captures:
            _record(metadata.captures, extract_layer_index(layer.layer_name), query)
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
            self._attend_compacted(query, metadata, extract_layer_index(layer.layer_name), output)
        return output

    def _attend_compacted(self, query: torch.Tensor, metadata: SplitMetadata, layer: int, output: torch.Tensor) -> None:
        """Each KV head with its own pages and length; its query group is the batch of query heads."""
        assert metadata.compacted is not None
        group = (-1, self.num_queries_per_kv, self.head_size)
        places = metadata.compacted.token_heads
        output.view(group)[places] = self.compacted(query.reshape(group)[places], metadata, layer)

    @abstractmethod
    def compacted(self, queries: torch.Tensor, metadata: SplitMetadata, layer: int) -> torch.Tensor:
        """Attention of the compacted rows: [sequences' tokens, group, head_dim] in and out."""


def _record(captures: list[Capture], layer: int, query: torch.Tensor) -> None:
    """Keep the captured queries of one layer; query [num_tokens, num_heads, head_dim]."""
    for capture in captures:
        capture.window.record(layer, capture.position, query[capture.first : capture.last])


def _rows_of(common: CommonAttentionMetadata, rows: list[int]) -> tuple[CommonAttentionMetadata, torch.Tensor]:
    """The part of a batch's metadata that concerns these rows, and their tokens: int64, on the batch's device."""
    device = common.seq_lens.device
    starts = common.query_start_loc_cpu.tolist()
    tokens = torch.cat([torch.arange(starts[row], starts[row + 1]) for row in rows])
    query_lens = [starts[row + 1] - starts[row] for row in rows]
    query_start = torch.zeros(len(rows) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(query_lens), 0, out=query_start[1:])
    at, token_rows = torch.tensor(rows, device=device), tokens.to(device)
    bounds = common.seq_lens_cpu_upper_bound
    max_seq_len = common.max_seq_len if bounds is None else int(bounds[rows].max())
    part = replace(
        common,
        query_start_loc=query_start.to(device),
        query_start_loc_cpu=query_start,
        seq_lens=common.seq_lens[at],
        seq_lens_cpu_upper_bound=None if bounds is None else bounds[rows],
        num_reqs=len(rows),
        num_actual_tokens=len(tokens),
        max_query_len=max(query_lens),
        max_seq_len=max_seq_len,
        block_table_tensor=common.block_table_tensor[at],
        slot_mapping=common.slot_mapping[token_rows],
    )
    return part, token_rows
