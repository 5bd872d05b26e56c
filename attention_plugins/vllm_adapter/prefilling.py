"""Prompts that are attended by a pattern: what a worker knows of them, and their chunks of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.attention.backend import CommonAttentionMetadata

from attention_plugins.decode.rows import LayerCache
from attention_plugins.prefill import plain
from attention_plugins.prefill.attention import dense_rows, sparse_attention
from attention_plugins.prefill.base import Chunk, Pattern, Plan, Reader
from attention_plugins.prefill.grid import ROWS, Grid
from attention_plugins.prefill.minference import TABLE
from attention_plugins.prefill.orders import PendingPatternReport, StartPattern, applies
from attention_plugins.prefill.paged import PagedTokens
from attention_plugins.prefill.registry import make_pattern

Tokens = torch.Tensor | Reader


class Executor(Protocol):
    """A platform's attention over plans."""

    estimators: ModuleType
    """What patterns estimate by: `attention_plugins.prefill.plain`, or kernels of the same names."""

    def attend(self, queries: torch.Tensor, chunk: Chunk, values: Tokens, plan: Plan) -> torch.Tensor:
        """Attention over a plan: [q_len, num_heads, head_dim].

        Args:
            queries: as the model gave them; those of `chunk` have a dtype that can be calculated with.
        """

    def dense_rows(self, queries: torch.Tensor, chunk: Chunk, values: Tokens, rows: torch.Tensor) -> torch.Tensor:
        """Dense attention of some of a chunk's queries, int64 [m]: float32 [m, num_heads, head_dim]."""


class NaiveExecutor:
    """In plain torch."""

    estimators: ModuleType = plain

    def attend(self, queries: torch.Tensor, chunk: Chunk, values: Tokens, plan: Plan) -> torch.Tensor:
        return sparse_attention(chunk, values, plan)[0]

    def dense_rows(self, queries: torch.Tensor, chunk: Chunk, values: Tokens, rows: torch.Tensor) -> torch.Tensor:
        return dense_rows(chunk, values, rows)


@dataclass
class Prompt:
    """One request.

    Attributes:
        computed: float32 [num_layers], see `PendingPatternReport`.
        carries: what each layer's pattern hands from chunk to chunk.
        pairs, tokens: attended so far.
    """

    request_id: str
    pattern: Pattern
    prompt_len: int
    computed: torch.Tensor
    carries: dict[int, torch.Tensor | None] = field(default_factory=dict)
    pairs: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class PromptChunk:
    """A chunk of a step.

    Attributes:
        first: place of its first query in the batch.
        position: of that query in the prompt.
        blocks: int64 [n], the request's blocks up to the chunk's end.
        grid: of all layers.
    """

    prompt: Prompt
    first: int
    position: int
    q_len: int
    blocks: torch.Tensor
    grid: Grid

    @property
    def k_len(self) -> int:
        return self.position + self.q_len


class Prefilling:
    """A worker's prompts with patterns."""

    def __init__(
        self,
        caches: Sequence[LayerCache],
        dtype: torch.dtype,
        calibration: Mapping[str, torch.Tensor],
        executor: Executor,
    ) -> None:
        """
        Args:
            caches: of the layers, in order.
            dtype: the model's.
            calibration: of this rank's heads.
        """
        self.caches, self.dtype, self.calibration, self.executor = caches, dtype, calibration, executor
        self.prompts: dict[str, Prompt] = {}
        self.current: dict[str, tuple[int, int]] = {}
        """The step's chunks: position and length."""
        self.ended: list[str] = []
        """Prompts that the step ends, or that a policy has compacted in front of their suffix."""

    def start(self, order: StartPattern) -> None:
        pattern = make_pattern(order.pattern)
        assert pattern is not None
        zeros = torch.zeros(len(self.caches), device=self.caches[0].pages.device)
        self.prompts[order.request_id] = Prompt(order.request_id, pattern, order.prompt_len, zeros)

    def finish(self, request_id: str) -> None:
        self.prompts.pop(request_id, None)

    def begin_step(
        self, computed: Mapping[str, int], scheduled: Mapping[str, int], compacted: Callable[[str], bool]
    ) -> None:
        """Find the step's chunks of prompts.

        Args:
            compacted: whether a request's prompt is so already; what follows (its suffix) is short and has no pages in
                order.
        """
        self.current, self.ended = {}, []
        for name, prompt in self.prompts.items():
            if name not in scheduled:
                continue
            position, tokens = computed[name], scheduled[name]
            if not compacted(name):
                self.current[name] = position, tokens
            if compacted(name) or position + tokens >= prompt.prompt_len:
                self.ended.append(name)

    def end_step(self) -> list[PendingPatternReport]:
        """Of the prompts that the step has ended."""
        prompts = [self.prompts.pop(name) for name in self.ended]
        self.current, self.ended = {}, []
        return [
            PendingPatternReport(prompt.request_id, prompt.pattern.name, prompt.tokens, prompt.computed, prompt.pairs)
            for prompt in prompts
        ]

    def apart(self, common: CommonAttentionMetadata, names: Sequence[str]) -> tuple[np.ndarray, list[PromptChunk]]:
        """Which of the batch's rows are planned, bool [rows], and their chunks."""
        mask, found = np.zeros(len(names), dtype=bool), []
        starts = common.query_start_loc_cpu.tolist()
        for row, name in enumerate(names):
            if name not in self.current:
                continue
            prompt, (position, q_len) = self.prompts[name], self.current[name]
            visible = visible_pairs(q_len, position + q_len, self.unit)
            prompt.pairs += visible
            prompt.tokens += q_len
            if not applies(prompt.pattern, len(self.caches), position + q_len):
                prompt.computed += visible
                continue
            mask[row] = True
            blocks = common.block_table_tensor[row, : -(-(position + q_len) // self.unit)].long()
            grid = Grid(q_len, position + q_len, self.unit, blocks.device)
            found.append(PromptChunk(prompt, starts[row], position, q_len, blocks, grid))
        return mask, found

    @property
    def unit(self) -> int:
        return self.caches[0].geometry.page_size

    def attend(self, cache: LayerCache, chunk: PromptChunk, query: torch.Tensor, output: torch.Tensor) -> None:
        """Attention of one layer to one chunk.

        Args:
            query: [num_tokens, num_heads, head_dim], the whole batch's.
            output: the same shape, written at the chunk's places.
        """
        self._attend(cache, chunk, query, output, chunk.prompt.pattern.applies(cache.layer, chunk.k_len))

    def _attend(
        self, cache: LayerCache, chunk: PromptChunk, query: torch.Tensor, output: torch.Tensor, planned: bool
    ) -> None:
        places = slice(chunk.first, chunk.first + chunk.q_len)
        prompt, layer, queries = chunk.prompt, cache.layer, query[places]
        seen = self._chunk(cache, chunk, queries)
        values = self._tokens(cache, chunk, values=True)
        plan = prompt.pattern.planned(seen) if planned else Plan.full(seen)
        prompt.computed[layer] += plan.mask.sum(dtype=torch.float32) / len(plan.mask)
        out = self.executor.attend(queries, seen, values, plan)
        if planned and prompt.pattern.corrects:
            dense, carry = partial(self._dense_rows, prompt, queries), prompt.carries.get(layer)
            out, prompt.carries[layer] = prompt.pattern.correct(seen, values, plan, out, carry, dense)
        output[places] = out.to(output.dtype)

    def _dense_rows(
        self, prompt: Prompt, queries: torch.Tensor, chunk: Chunk, values: Tokens, rows: torch.Tensor
    ) -> torch.Tensor:
        """The executor's, counted: a row is a 128th of its block's pairs."""
        prompt.computed[chunk.layer] += ((chunk.offset + rows) // self.unit + 1).sum() / ROWS
        return self.executor.dense_rows(queries, chunk, values, rows)

    @torch.inference_mode()
    def warm_up(
        self, names: Sequence[str], most_tokens: int, max_model_len: int, num_heads: int, dtype: torch.dtype
    ) -> None:
        """Let patterns do all they can over a page that nobody has, so that no request waits for a compiler: kernels
        differ by the power of two that a context fits in.

        Args:
            names: of patterns.
            most_tokens: of a step.
            dtype: of the queries that attention gets.
        """
        cache = self.caches[-1]  # first layers may be dense
        device, head_dim = cache.pages.device, cache.geometry.head_dim
        for name in names:
            pattern = make_pattern({"pattern": name})
            assert pattern is not None
            powers = [2**power for power in range(ROWS.bit_length(), max_model_len.bit_length())]
            # Short last chunks have kernels of their own.
            for q_len, k_len in [*((most_tokens, n) for n in powers), (20, 256), (50, 256), (100, 256)]:
                q_len = min(q_len, k_len)
                query = torch.zeros(q_len, num_heads, head_dim, device=device).to(dtype)
                blocks = torch.zeros(-(-k_len // self.unit), dtype=torch.int64, device=device)
                computed = torch.zeros(len(self.caches), device=device)
                prompt = Prompt("", pattern, k_len, computed)
                grid = Grid(q_len, k_len, self.unit, device)
                chunk = PromptChunk(prompt, 0, k_len - q_len, q_len, blocks, grid)
                self._attend(cache, chunk, query, query.to(self.dtype, copy=True), planned=True)

    def _chunk(self, cache: LayerCache, chunk: PromptChunk, queries: torch.Tensor) -> Chunk:
        if queries.dtype != self.dtype:  # an 8-bit cache's
            queries = (queries.float() * cache.quant.query).to(self.dtype)
        return Chunk(
            queries,
            self._tokens(cache, chunk, values=False),
            cache.scale,
            self.unit,
            cache.layer,
            chunk.prompt.prompt_len,
            self.calibration,
            self.executor.estimators,
            chunk.grid,
        )

    def _tokens(self, cache: LayerCache, chunk: PromptChunk, values: bool) -> PagedTokens:
        g = cache.geometry
        pages = cache.pages.view(torch.float8_e4m3fn) if cache.pages.dtype == torch.uint8 else cache.pages
        return PagedTokens(
            pages,
            g.pages_of(cache.layer, chunk.blocks),
            cache.codec,
            g.page_size,
            g.head_dim,
            chunk.k_len,
            values,
            self.dtype,
            cache.quant.value if values else cache.quant.key,
        )


def visible_pairs(q_len: int, k_len: int, unit: int) -> int:
    """(Block of queries, unit of keys) pairs of a chunk with something to compute: what `Grid.visible` holds."""
    ends = (min(first + ROWS, q_len) for first in range(0, q_len, ROWS))
    return sum(-(-(k_len - q_len + end) // unit) for end in ends)


def prefill_calibration(additional_config: Mapping[str, Any] | None, num_heads: int) -> dict[str, torch.Tensor]:
    """What `longreach calibrate` has found for patterns, of this rank's heads; the server has looked at the file
    before.

    Args:
        num_heads: query heads of this rank.
    """
    file = (additional_config or {}).get("longreach", {}).get("prefill", {}).get("calibration")
    if file is None:
        return {}
    found = load_file(file)
    if TABLE in found:
        first = get_tensor_model_parallel_rank() * num_heads
        found[TABLE] = found[TABLE][:, first : first + num_heads]
    return found
