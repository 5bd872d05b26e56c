"""A model runner's side of the CUDA adapter: requests whose tokens are known, their cache, steps and CUDA graphs.

A FULL graph is what it fixes: the metadata that was built at its capture, read again in every replay. A replay
builds metadata too, as vLLM does, and only what that writes into tensors that were there before reaches the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from attention_plugins import kernels
from attention_plugins.decode.rows import LayerCache
from attention_plugins.prefill import plain
from attention_plugins.prefill.orders import StartPattern
from attention_plugins.vllm_adapter.cuda_prefill import FlashExecutor
from attention_plugins.vllm_adapter.pages import flat_pages
from attention_plugins.vllm_adapter.prefilling import Prefilling
from attention_plugins.vllm_adapter.runtime import BatchKind, CompressionRuntime, set_runtime
from attention_plugins.vllm_adapter.selection import Selecting, Selection
from kvcache.compressor import Compressor
from kvcache.evidence import QuantScales
from kvcache.orders import Compact, Start
from kvcache.pages import InterleavedCodec
from kvcache.plan import RetentionPlan
from kvcache.tables import PageTables
from kvcache.vllm_adapter.manager import CompressibleAttentionSpec
from kvcache.vllm_adapter.orders import StepOrders, attach_orders
from tests.naive_flash import attention

PAGE, HEAD_DIM, LAYERS = 16, 8, 3
SCALE = 7 / 32  # few bits: 8-bit keys have equal scores, and by hand they stay equal
NULL = 0
"""vLLM's null block, which stands in block tables where a block was released; nobody may use what is in it."""
MAX_REQS, MAX_LEN, BLOCKS = 8, 192, 80
UNWRITTEN = 7.25
"""What outputs hold before a forward pass."""


class UnevenCompressor(Compressor):
    """Shares pages over layers and heads at random, down to none: rows of one request differ in length."""

    def _page_counts(self, policy: Any, plan: RetentionPlan, scores: Any, statistics: Any) -> torch.Tensor:
        shape = (self.geometry.num_layers, self.geometry.num_kv_heads)
        room = torch.full(shape, plan.full_pages).flatten()
        owners = torch.arange(len(room)).repeat_interleave(room)
        chosen = owners[torch.randperm(len(owners))[: plan.kept_pages * len(room)]]
        return torch.bincount(chosen, minlength=len(room)).view(shape)


@dataclass
class Request:
    """One request. Numbers are what the cache holds and what attention is given: fp8 where it is quantised.

    Attributes:
        keys, values: [layers, kv_heads, n, d].
        queries: [layers, n, heads, d].
        kept_pages: the plan's; None for a request without a policy.
        window: last queries of the prompt that its policy asks for; 0: none.
        index: its place in the runner's request table.
        blocks: vLLM's block table; `targets`: where it was compacted into.
    """

    name: str
    prompt_len: int
    kept_pages: int | None
    window: int
    index: int
    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    pattern: dict[str, Any] | None = None
    blocks: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    computed: int = 0
    compacted: bool = False

    @property
    def plan(self) -> RetentionPlan:
        assert self.kept_pages is not None
        return RetentionPlan(self.prompt_len, PAGE, self.kept_pages)

    @property
    def policy(self) -> dict[str, Any]:
        if self.window:
            return {"policy": "snapkv", "budget": 4096, "window": self.window, "sinks": 0, "kernel": 1}
        return {"policy": "random", "budget": 4096, "recent": 0, "sinks": 0, "seed": self.index}


@dataclass
class Step:
    """One step that ran: which tokens of which request, in row order, and the outputs [layers][tokens, heads, d]."""

    rows: list[tuple[Request, int, int]]
    metadata: Any
    outputs: list[torch.Tensor]
    dense: list[torch.Tensor | None]
    """What the dense path alone wrote, by layer; None where it did not run."""

    def tokens(self) -> Iterator[tuple[Request, int, int, slice]]:
        """(request, first position, position behind the last, rows of the output)."""
        start = 0
        for request, first, last in self.rows:
            yield request, first, last, slice(start, start + last - first)
            start += last - first


@dataclass
class Graph:
    """A FULL graph of `size` rows, captured with this metadata and these tensors."""

    kind: BatchKind | Selection
    size: int
    metadata: Any
    queries: list[torch.Tensor]
    outputs: list[torch.Tensor]


class World:
    """Everything around the adapter that is vLLM's on a GPU."""

    def __init__(
        self,
        backend: ModuleType,
        patch: Callable[[Any, str, Any], None],
        *,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        fp8: bool = False,
        softcap: float = 0.0,
        fa_version: int = 3,
        max_len: int = MAX_LEN,
        sinks: bool = False,
    ) -> None:
        """
        Args:
            backend: `attention_plugins.vllm_adapter.cuda_backend`.
            patch: sets an attribute for the length of a test.
            sinks: whether the model has learned ones.
        """
        torch.manual_seed(num_heads * 100 + num_kv_heads)
        self.num_heads, self.num_kv_heads, self.fp8, self.softcap = num_heads, num_kv_heads, fp8, softcap
        self.max_len = max_len
        self.sinks = torch.linspace(-2.0, 3.0, num_heads) if sinks else None
        blocks = BLOCKS * max_len // MAX_LEN
        shape = (LAYERS, blocks, num_kv_heads, PAGE, 2 * HEAD_DIM)
        # NaN, in fp8 too: whatever was never written, or was released, shows where it is read.
        self.cache = torch.full(shape, 0x7F, dtype=torch.uint8) if fp8 else torch.full(shape, float("nan"))
        self.free = [block for block in torch.randperm(blocks).tolist() if block != NULL]
        self.scales = [
            QuantScales(0.75 + layer / 4, 0.5 + layer / 8, 1.5 - layer / 4) if fp8 else QuantScales()
            for layer in range(LAYERS)
        ]
        pages, geometry = flat_pages(list(self.cache))
        tables = PageTables(geometry, slots=MAX_REQS, width=max_len // PAGE + 1)
        codec = InterleavedCodec(PAGE, HEAD_DIM)
        self.compressor = UnevenCompressor(
            geometry, codec, pages, tables, scale=SCALE, quant=self.scales, keep_positions=True
        )
        self.names: dict[int, str] = {}
        self.layers: list[SimpleNamespace] = []
        caches = [LayerCache(layer, pages, geometry, codec, quant, SCALE) for layer, quant in enumerate(self.scales)]
        executor = FlashExecutor(self.layers, kernels, plain)
        self.runtime = CompressionRuntime(
            self.compressor,
            Selecting(self.compressor, {}, ()),
            Prefilling(caches, self.dtype, {}, executor),
            lambda common: [self.names[index] for index in common.req_idx.tolist()],
        )
        self.config = SimpleNamespace()
        set_runtime(self.config, self.runtime)
        self.requests: dict[str, Request] = {}

        self.buffers = backend.StepBuffers.make(MAX_REQS, num_kv_heads, tables.blocks.shape[1], pages.device)
        self.builder = make_builder(backend, self.config, num_kv_heads, self.buffers)
        self.layers += [self._layer(backend, layer, pages, fa_version) for layer in range(LAYERS)]
        for layer, cache in zip(self.layers, caches, strict=True):
            layer.impl.cache = cache
        # The runner's own: a graph reads them where they are.
        self.query_start = torch.zeros(MAX_REQS + 1, dtype=torch.int32)
        self.seq_lens = torch.zeros(MAX_REQS, dtype=torch.int32)
        self.block_table = torch.zeros(MAX_REQS, max_len // PAGE + 3, dtype=torch.int32)
        self.dense_written: list[torch.Tensor | None] = [None] * LAYERS
        patch(FlashAttentionImpl, "forward", self._dense_forward)

    def _layer(self, backend: ModuleType, index: int, pages: torch.Tensor, fa_version: int) -> SimpleNamespace:
        impl = backend.CUDACompressedImpl.__new__(backend.CUDACompressedImpl)
        impl.num_heads, impl.num_kv_heads, impl.head_size = self.num_heads, self.num_kv_heads, HEAD_DIM
        impl.num_queries_per_kv = self.num_heads // self.num_kv_heads
        impl.scale, impl.logits_soft_cap = SCALE, self.softcap
        impl.kv_cache_dtype = "fp8" if self.fp8 else "auto"
        impl.vllm_flash_attn_version, impl.batch_invariant_enabled = fa_version, False
        impl.index, impl.sinks = index, self.sinks
        impl.pages, impl.page_size, impl.buffers, impl.max_num_splits = pages, PAGE, self.buffers, 32
        scales = self.scales[index]
        return SimpleNamespace(
            layer_name=f"model.layers.{index}.self_attn.attn",
            impl=impl,
            index=index,
            kv_cache=self.cache[index],
            _q_scale=torch.tensor(scales.query),
            _k_scale=torch.tensor(scales.key),
            _v_scale=torch.tensor(scales.value),
        )

    @property
    def dtype(self) -> torch.dtype:
        """The model's; queries of an fp8 cache are fp8, outputs are not."""
        return torch.bfloat16 if self.fp8 else torch.float32

    # Requests

    def add(self, name: str, prompt_len: int, kept_pages: int | None = None, window: int = 0) -> Request:
        used = {request.index for request in self.requests.values()}
        index = next(i for i in range(5, 100) if i not in used)  # rows and places in the request table differ
        request = Request(name, prompt_len, kept_pages, window, index, *self._numbers())
        self.requests[name], self.names[index] = request, name
        return request

    def _numbers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        keys = torch.randn(LAYERS, self.num_kv_heads, self.max_len, HEAD_DIM)
        values = torch.randn(LAYERS, self.num_kv_heads, self.max_len, HEAD_DIM)
        queries = 3 * torch.randn(LAYERS, self.max_len, self.num_heads, HEAD_DIM)
        if self.fp8:
            return keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn), queries.to(torch.float8_e4m3fn)
        return keys, values, queries

    def expected(self, layer: int, request: Request, first: int, last: int) -> torch.Tensor:
        """Attention of the queries at these positions over what is kept, from the request's numbers alone."""
        scales = self.scales[layer]
        columns = torch.arange(last)
        kept = torch.ones(self.num_kv_heads, last, dtype=torch.bool)
        if request.compacted:
            kept[:, : request.plan.full_pages * PAGE] = False
            for row, positions in zip(kept, self.compressor.kept_positions(request.name)[layer], strict=True):
                row[positions] = True
        seen = kept[:, None] & (columns <= torch.arange(first, last)[:, None])
        return attention(
            request.queries[layer, first:last].float() * scales.query,
            request.keys[layer, :, :last].float() * scales.key,
            request.values[layer, :, :last].float() * scales.value,
            seen,
            SCALE,
            self.softcap,
            self.sinks,
        )

    def _allocate(self, request: Request, length: int) -> None:
        while len(request.blocks) * PAGE < length:
            request.blocks.append(self.free.pop())

    def _release(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if block != NULL:
                self.cache[:, block] = 0x7F if self.fp8 else float("nan")
                self.free.insert(0, block)

    # Steps

    def _order(self, orders: StepOrders, request: Request, num_tokens: int) -> list[int]:
        """What the scheduler orders for a request's step, and the blocks that are free behind it."""
        sources: list[int] = []
        if request.kept_pages is not None and not request.computed:
            orders.start.append(Start(request.name, request.policy, request.plan))
        if request.pattern and not request.computed:
            orders.patterns.append(StartPattern(request.name, request.pattern, request.prompt_len))
        if request.kept_pages is not None and request.computed >= request.prompt_len and not request.compacted:
            request.targets = [self.free.pop() for _ in range(request.kept_pages)]
            orders.compact.append(Compact(request.name, list(request.blocks), request.targets, request.prompt_len))
            sources = request.blocks[: request.plan.full_pages]
            request.compacted = True
            request.blocks[: request.plan.full_pages] = [NULL] * request.plan.full_pages
        self._allocate(request, request.computed + num_tokens)
        return sources

    @contextmanager
    def step(
        self, scheduled: Mapping[str, int], *, finished: Iterable[str] = (), preempted: Iterable[str] = ()
    ) -> Iterator[list[tuple[Request, int, int]]]:
        """Do what scheduler and worker do around a forward pass; gives (request, first, last position) of each row."""
        for name in (*finished, *preempted):
            request = self.requests[name]
            self._release(request.blocks + request.targets)
            request.blocks, request.targets, request.computed, request.compacted = [], [], 0, False
        for name in finished:
            self.names.pop(self.requests.pop(name).index)
        orders, sources = StepOrders(), []
        for name, num_tokens in scheduled.items():
            sources += self._order(orders, self.requests[name], num_tokens)
        output = SimpleNamespace(
            finished_req_ids=set(finished),
            preempted_req_ids=set(preempted) or None,
            num_scheduled_tokens=scheduled,
            scheduled_new_reqs=[],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=list(scheduled), num_computed_tokens=[self.requests[name].computed for name in scheduled]
            ),
        )
        attach_orders(output, orders)
        self.runtime.begin_step(output)
        self._release(sources)
        rows = []
        for name, num_tokens in scheduled.items():
            request = self.requests[name]
            first, last = request.computed, request.computed + num_tokens
            for position in range(first, last):
                content = torch.cat([request.keys[:, :, position], request.values[:, :, position]], dim=-1)
                cache = self.cache[:, request.blocks[position // PAGE], :, position % PAGE]
                cache.copy_(content.view(torch.uint8) if self.fp8 else content)
            rows.append((request, first, last))
        try:
            yield rows
        finally:
            self.runtime.end_step()
            for request, _, last in rows:
                request.computed = last

    def common(self, rows: list[tuple[Request, int, int]], padded: int | None = None) -> CommonAttentionMetadata:
        """As the runner makes it; padded rows have no tokens, and their lengths are 0."""
        size = len(rows) if padded is None else padded
        lens = np.array([last - first for _, first, last in rows], dtype=np.int32)
        start = np.zeros(size + 1, dtype=np.int32)
        start[1 : len(rows) + 1] = lens.cumsum()
        start[len(rows) + 1 :] = lens.sum()
        bounds = torch.zeros(size, dtype=torch.int32)
        self.block_table.fill_(NULL)
        self.seq_lens.zero_()
        for row, (request, _, last) in enumerate(rows):
            self.seq_lens[row] = bounds[row] = last
            self.block_table[row, : len(request.blocks)] = torch.tensor(request.blocks)
        self.query_start[: size + 1] = torch.from_numpy(start)
        tokens = size if padded is not None else int(lens.sum())
        return CommonAttentionMetadata(
            query_start_loc=self.query_start[: size + 1],
            query_start_loc_cpu=torch.from_numpy(start),
            seq_lens=self.seq_lens[:size],
            num_reqs=size,
            num_actual_tokens=tokens,
            max_query_len=int(lens.max()),
            max_seq_len=int(bounds.max()),
            block_table_tensor=self.block_table[:size],
            slot_mapping=torch.zeros(tokens, dtype=torch.int64),
            seq_lens_cpu_upper_bound=bounds,
            req_idx=np.array([request.index for request, _, _ in rows], dtype=np.intp),
        )

    def run(self, scheduled: Mapping[str, int], *, padding: int = 0, **others: Any) -> Step:
        """A step outside FULL graphs; `padding`: tokens behind the batch, as of a piecewise graph."""
        with self.step(scheduled, **others) as rows:
            return self.ran(rows, padding)

    def ran(self, rows: list[tuple[Request, int, int]], padding: int = 0) -> Step:
        """A step that has begun, outside FULL graphs."""
        metadata = self.builder.build(0, self.common(rows))
        outputs, dense = [], []
        for layer in self.layers:
            queries = torch.cat([request.queries[layer.index, first:last] for request, first, last in rows])
            queries = torch.cat([queries, torch.ones(padding, *queries.shape[1:]).to(queries.dtype)])
            # As vLLM passes them without torch.compile: a part of a wider projection.
            queries = torch.cat([queries, queries], 1)[:, : self.num_heads]
            outputs.append(self._forward(layer, queries, metadata))
            dense.append(self.dense_written[layer.index])
        return Step(rows, metadata, outputs, dense)

    def capture(self, kind: BatchKind | Selection, size: int) -> Graph:
        """Capture a FULL graph, as vLLM does with rows of one token each and an empty block table."""
        self.seq_lens[:size] = 1
        self.block_table.fill_(NULL)
        self.query_start[: size + 1] = torch.arange(size + 1)
        common = CommonAttentionMetadata(
            query_start_loc=self.query_start[: size + 1],
            query_start_loc_cpu=torch.arange(size + 1, dtype=torch.int32),
            seq_lens=self.seq_lens[:size],
            num_reqs=size,
            num_actual_tokens=size,
            max_query_len=1,
            max_seq_len=MAX_LEN,
            block_table_tensor=self.block_table[:size],
            slot_mapping=torch.zeros(size, dtype=torch.int64),
            seq_lens_cpu_upper_bound=torch.ones(size, dtype=torch.int32),
            req_idx=np.arange(size),
        )
        self.runtime.graph = kind
        metadata = self.builder.build_for_cudagraph_capture(common)
        self.runtime.graph = None
        shape = (size, self.num_heads, HEAD_DIM)
        queries = [torch.zeros(shape).to(torch.float8_e4m3fn if self.fp8 else torch.float32) for _ in self.layers]
        return Graph(kind, size, metadata, queries, [torch.zeros(shape, dtype=self.dtype) for _ in self.layers])

    def replay(self, graph: Graph, names: Iterable[str], **others: Any) -> Step:
        """A step of one token for each request, by a FULL graph."""
        with self.step(dict.fromkeys(names, 1), **others) as rows:
            return self.replayed(graph, rows)

    def replayed(self, graph: Graph, rows: list[tuple[Request, int, int]]) -> Step:
        """What a FULL graph does in a step that has begun."""
        assert self.runtime.wanted == graph.kind
        self.runtime.graph = graph.kind
        self.builder.build(0, self.common(rows, graph.size))
        outputs, dense = [], []
        for layer, queries, output in zip(self.layers, graph.queries, graph.outputs, strict=True):
            for row, (request, first, last) in enumerate(rows):
                queries[row] = request.queries[layer.index, first:last]
            self._forward(layer, queries, graph.metadata, output)
            outputs.append(output.clone())
            dense.append(self.dense_written[layer.index])
        return Step(rows, graph.metadata, outputs, dense)

    @torch.inference_mode()
    def _forward(
        self, layer: Any, queries: torch.Tensor, metadata: Any, output: torch.Tensor | None = None
    ) -> torch.Tensor:
        output = torch.empty(queries.shape, dtype=self.dtype) if output is None else output
        output.fill_(UNWRITTEN)
        self.dense_written[layer.index] = None
        unused = torch.zeros(0)  # keys and values are in the cache already
        given = layer.impl.forward(layer, queries, unused, unused, layer.kv_cache, metadata, output)
        assert given is output
        return output

    def _dense_forward(
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
        """vLLM's `FlashAttentionImpl.forward` in loops. Rows with queries and no length are its callers' fault."""
        starts, scales = attn_metadata.query_start_loc.tolist(), self.scales[layer.index]
        assert kv_cache is layer.kv_cache and starts[-1] <= attn_metadata.num_actual_tokens <= len(query)
        for row, length in enumerate(attn_metadata.seq_lens.tolist()):
            first, last = starts[row : row + 2]
            if first == last:
                continue
            hidden = length == 1  # attended apart: only the last query sees a key, and what it gives is overwritten
            assert last - first > 0 and (hidden or last - first <= length) and length <= attn_metadata.max_seq_len
            assert last - first <= attn_metadata.max_query_len
            blocks = attn_metadata.block_table[row, : -(-length // PAGE)].long()
            content = kv_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length]
            content = (content.contiguous().view(torch.float8_e4m3fn) if self.fp8 else content).float()
            seen = torch.arange(length) <= torch.arange(length - (last - first), length)[:, None]
            output[first:last] = attention(
                query[first:last].float() * scales.query,
                content[..., :HEAD_DIM] * scales.key,
                content[..., HEAD_DIM:] * scales.value,
                seen.expand(self.num_kv_heads, -1, -1),
                SCALE,
                self.softcap,
                self.sinks,
            )
        self.dense_written[layer.index] = output.clone()
        return output


def make_builder(backend: ModuleType, config: Any, num_kv_heads: int, buffers: Any) -> Any:
    """A metadata builder as vLLM makes it for FlashAttention 2, which prepares no schedule."""
    builder = backend.CUDACompressedMetadataBuilder.__new__(backend.CUDACompressedMetadataBuilder)
    builder.vllm_config, builder.buffers = config, buffers
    builder.kv_cache_spec = CompressibleAttentionSpec(
        block_size=PAGE, num_kv_heads=num_kv_heads, head_size=HEAD_DIM, dtype=torch.float32
    )
    builder.num_heads_kv = num_kv_heads
    builder.aot_schedule, builder.aot_sliding_window = False, None
    builder.use_full_cuda_graph, builder.max_cudagraph_size, builder.max_num_splits = True, MAX_REQS, 0
    builder.dcp_world_size, builder.rswa_window, builder.mm_prefix_query_ranges_np = 1, None, None
    return builder
