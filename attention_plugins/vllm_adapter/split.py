"""A batch whose compacted rows are attended apart from the others. Mix-ins for any backend."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder, CommonAttentionMetadata

from attention_plugins.batch import CompactedBatch, plan_compacted
from attention_plugins.decode.rows import LayerCache
from attention_plugins.vllm_adapter.prefilling import Prefilling, PromptChunk
from attention_plugins.vllm_adapter.runtime import BatchKind, Capture, CompressionRuntime, runtime_for
from attention_plugins.vllm_adapter.selection import SelectedRows
from kvcache.tables import PageTables, to_device
from kvcache.vllm_adapter.manager import CompressibleAttentionSpec


@dataclass
class SplitMetadata:
    """A step's batch.

    Attributes:
        dense: the backend's own metadata of the batch, or None when every row is compacted. In a mixed batch it
            takes compacted rows as so short that they cost nothing; what it writes for them is overwritten.
        compacted: the compacted rows that read everything, or None.
        tables: where their pages are.
        plan: what the kernel wants prepared for the compacted rows.
        captures: queries to keep.
        mask: bool [rows, 1, 1]; in a mixed CUDA graph, which rows are compacted.
        selected: rows that select what they read.
        chunks: of prompts with a pattern.
        prefilling: attends these.
    """

    dense: Any
    compacted: CompactedBatch | None = None
    tables: PageTables | None = None
    plan: Any = None
    captures: list[Capture] = field(default_factory=list)
    mask: torch.Tensor | None = None
    selected: list[SelectedRows] = field(default_factory=list)
    chunks: list[PromptChunk] = field(default_factory=list)
    prefilling: Prefilling | None = None


class SplitBuilder(AttentionMetadataBuilder if TYPE_CHECKING else object):  # type: ignore[misc]
    """In front of a backend's metadata builder; layers that don't see everything get vLLM's metadata."""

    @property
    def ours(self) -> bool:
        return isinstance(self.kv_cache_spec, CompressibleAttentionSpec)

    hidden_len: int | None = None
    """Length that rows which are attended apart have for the backend's own attention; None: that of their queries, for
    kernels that take no fewer keys than queries."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        if not self.ours:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        common, runtime = common_attn_metadata, runtime_for(self.vllm_config)
        if runtime:
            runtime.audit(common)
        if runtime is None or runtime.kind is BatchKind.DENSE:
            dense = super().build(common_prefix_len, common, fast_build)
            return SplitMetadata(dense, captures=runtime.captures(common) if runtime else [])
        return self.build_split(runtime, common)

    def build_split(self, runtime: CompressionRuntime, common: CommonAttentionMetadata) -> SplitMetadata:
        """The metadata of a batch in which some rows are compacted, or select what they read."""
        slots, starts = runtime.slots(common), common.query_start_loc_cpu.numpy()
        selects, selected = runtime.selected(common, slots)
        planned, chunks = runtime.planned(common)
        compacted = np.where(selects, -1, slots)
        apart = selects | planned | (compacted >= 0)
        dense, batch, plan, tables = None, None, None, runtime.compressor.tables
        if not apart.all():
            dense = super().build(0, shortened(common, apart, self.hidden_len))
        if (compacted >= 0).any():
            heads = self.kv_cache_spec.num_kv_heads
            batch = plan_compacted(compacted, starts, common.seq_lens, common.block_table_tensor, heads)
            plan = self.kernel_plan(batch, tables)
        captures = runtime.captures(common)
        return SplitMetadata(
            dense, batch, tables, plan, captures, selected=selected, chunks=chunks, prefilling=runtime.prefilling
        )

    def kernel_plan(self, batch: CompactedBatch, tables: PageTables) -> Any:
        """What the kernel wants prepared, for all layers."""
        return None


class SplitImpl(AttentionImpl if TYPE_CHECKING else object):  # type: ignore[misc]
    """In front of a backend's implementation, which adds `attend`."""

    pages: torch.Tensor
    """The whole KV cache, [num_pages, 2 * page_size * head_dim]; set by the worker, as the others."""
    index: int
    """Of the layer, among those of full attention."""
    page_size: int
    cache: LayerCache
    sinks: torch.Tensor | None
    """Learned logits that take part in each softmax, [num_heads]; vLLM's own attribute."""

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
        if not isinstance(attn_metadata, SplitMetadata):  # warm-up and profiling runs, and layers that aren't ours
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        metadata = attn_metadata
        for capture in metadata.captures:  # this step's keys are in the cache already
            capture.record(self.index, query)
        if metadata.dense is not None:
            super().forward(
                layer, query, key, value, kv_cache, metadata.dense, output, output_scale, output_block_scale
            )
        if metadata.compacted is not None:
            self._attend_compacted(layer, query, metadata, output)
        for selected in metadata.selected:
            self._attend_selected(query, selected, output)
        for chunk in metadata.chunks:
            assert metadata.prefilling is not None
            metadata.prefilling.attend(self.cache, chunk, query, output)
        return output

    def _attend_selected(self, query: torch.Tensor, selected: SelectedRows, output: torch.Tensor) -> None:
        shape = (-1, self.num_kv_heads, self.num_queries_per_kv, self.head_size)
        queries, out, n = query.reshape(shape), output.view(shape), len(selected.rows)
        if selected.tokens is None:
            selected.reader.read(out[:n], queries[:n], selected.rows, self.cache, selected.whole)
            return
        queries = queries[selected.tokens]
        found = torch.empty(queries.shape, dtype=out.dtype, device=out.device)
        selected.reader.read(found, queries, selected.rows, self.cache, selected.whole)
        out[selected.tokens] = found

    def _attend_compacted(self, layer: Any, query: torch.Tensor, metadata: SplitMetadata, output: torch.Tensor) -> None:
        """Each KV head with its own pages and length; its query group is the batch of query heads."""
        assert metadata.compacted is not None
        group = (-1, self.num_queries_per_kv, self.head_size)
        # Without torch.compile `query` is a part of the joint projection, which no view can regroup.
        queries, out, places = query.reshape(group), output.view(group), metadata.compacted.token_heads
        if places is not None:
            out[places] = self.attend(layer, queries[places], metadata)
        elif metadata.mask is None:
            self.attend(layer, queries, metadata, out)
        else:
            rows = (len(metadata.mask), -1, self.head_size)
            attended = self.attend(layer, queries, metadata).view(rows)
            torch.where(metadata.mask, attended, out.view(rows), out=out.view(rows))

    @abstractmethod
    def attend(
        self, layer: Any, queries: torch.Tensor, metadata: SplitMetadata, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attention of the compacted rows: [sequences' tokens, group, head_dim] in and out."""


def shortened(common: CommonAttentionMetadata, apart: np.ndarray, length: int | None) -> CommonAttentionMetadata:
    """The same batch with the rows that are attended apart cut short: they then read next to nothing, and what that
    gives is overwritten.

    Args:
        apart: bool [rows].
        length: that they get; None: that of their queries.
    """
    device = common.seq_lens.device
    lens = common.query_start_loc[1:] - common.query_start_loc[:-1]
    lens = lens if length is None else torch.full_like(lens, length)
    short = torch.where(to_device(torch.from_numpy(apart), device), lens, common.seq_lens)
    bounds = common.seq_lens_cpu_upper_bound
    if bounds is None:
        return replace(common, seq_lens=short)
    lens = common.query_start_loc_cpu.diff()
    lens = lens if length is None else torch.full_like(lens, length)
    bounds = torch.where(torch.from_numpy(apart), lens, bounds).to(bounds.dtype)
    return replace(common, seq_lens=short, seq_lens_cpu_upper_bound=bounds, max_seq_len=int(bounds.max()))


def share_with_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Let learned sinks have their part of attention that was computed without them, in place.

    A sink s adds exp(s) to the softmax's denominator and no value, so what came out is weighed with
    exp(lse) / (exp(lse) + exp(s)).

    Args:
        out: [tokens, group, head_dim].
        lse: float32 [group, tokens], logarithms of the denominators.
        sinks: [num_kv_heads, group].
        head: int64 [tokens], the KV head of each.
    """
    return out.mul_(torch.sigmoid(lse.T - sinks[head].float())[..., None])
