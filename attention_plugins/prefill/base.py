"""The pattern interface: a chunk of a prompt (`Chunk`), what is computed of its attention (`Plan`), and who decides."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar, Protocol

import torch
from pydantic import Field

from attention_plugins.prefill.grid import ROWS, Grid
from kvcache.method import Arguments, Method

TILE = 8192
"""Keys that are looked at together. Bounds the memory of what is built from them."""


class Reader(Protocol):
    """Keys or values that lie in pages: what stands in for a tensor [num_kv_heads, k_len, head_dim].

    What it hands out can be multiplied: of an 8-bit cache, 16-bit copies.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self, first: int, last: int) -> torch.Tensor:
        """Those of positions `first` up to, without, `last`: [num_kv_heads, last - first, head_dim]."""

    def gather(self, positions: torch.Tensor) -> torch.Tensor:
        """Those of int64 positions [num_kv_heads, ...]: [num_kv_heads, ..., head_dim]."""


def read(source: torch.Tensor | Reader, first: int, last: int) -> torch.Tensor:
    """A range of keys or values, [num_kv_heads, last - first, head_dim]."""
    return source[:, first:last] if isinstance(source, torch.Tensor) else source.read(first, last)


def gather(source: torch.Tensor | Reader, positions: torch.Tensor) -> torch.Tensor:
    """Single keys or values: int64 [num_kv_heads, ...] -> [num_kv_heads, ..., head_dim]."""
    if not isinstance(source, torch.Tensor):
        return source.gather(positions)
    heads = torch.arange(len(source), device=source.device).view(-1, *(1,) * (positions.dim() - 1))
    return source[heads, positions]


def plain_estimators() -> ModuleType:
    """`attention_plugins.prefill.plain`, which needs this module."""
    return import_module("attention_plugins.prefill.plain")


@dataclass(frozen=True)
class Chunk:
    """One layer's view of a part of a prompt, whose keys are in the cache already.

    Attributes:
        queries: [q_len, num_heads, head_dim], post-RoPE.
        keys: [num_kv_heads, k_len, head_dim], or what reads them; the last `q_len` are the queries' own.
        scale: softmax scale.
        unit: keys of a unit of the plan; the cache's page on GPUs.
        layer: index of the layer.
        prompt_len: of the whole prompt; None: this chunk is its end.
        calibration: what `longreach calibrate` found for this model, by name, on the CPU; empty without it.
        ops: the estimators: `attention_plugins.prefill.plain`, or kernels of the same names.
        shared: the grid, where it is there already: it is the same in all layers.
    """

    queries: torch.Tensor
    keys: torch.Tensor | Reader
    scale: float
    unit: int = 16
    layer: int = 0
    prompt_len: int | None = None
    calibration: Mapping[str, torch.Tensor] = field(default_factory=dict)
    ops: ModuleType = field(default_factory=plain_estimators, repr=False)
    shared: Grid | None = field(default=None, repr=False)

    @property
    def num_heads(self) -> int:
        return self.queries.shape[1]

    @property
    def num_kv_heads(self) -> int:
        return self.keys.shape[0]

    @property
    def prompt_end(self) -> int:
        return self.k_len if self.prompt_len is None else self.prompt_len

    @property
    def q_len(self) -> int:
        return self.queries.shape[0]

    @property
    def k_len(self) -> int:
        return self.keys.shape[1]

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.k_len - self.q_len

    def block_of(self, position: int) -> int:
        """First row, counted from the chunk's start, of the block of queries that this position lies in; not below 0,
        and behind the chunk's end for positions that are."""
        return max(0, (position - self.offset) // ROWS * ROWS)

    @cached_property
    def grid(self) -> Grid:
        return self.shared or Grid(self.q_len, self.k_len, self.unit, self.queries.device)

    def tiles(self, size: int = TILE) -> Iterator[tuple[int, torch.Tensor]]:
        """The keys, so many at a time: position of the first, and [num_kv_heads, size or fewer, head_dim]."""
        for first in range(0, self.k_len, size):
            yield first, read(self.keys, first, min(first + size, self.k_len))


@dataclass(frozen=True)
class Plan:
    """Which units of keys each block of queries attends to.

    Attributes:
        mask: bool [heads, q_blocks, k_units]; heads are query heads, or KV heads where a group shares. Heads
            that are alike may be one in memory (stride 0).
        grid: what the mask is drawn on.
    """

    mask: torch.Tensor
    grid: Grid

    @classmethod
    def forced(cls, mask: torch.Tensor, grid: Grid, heads: int | None = None) -> Plan:
        """The plan of a mask that may lack what every plan has, and may go above the diagonal. The one place where
        this is seen to.

        Args:
            mask: bool, anything that broadcasts to [heads, q_blocks, k_units].
            heads: where the mask doesn't say.
        """
        shape = len(mask) if heads is None else heads, grid.q_blocks, grid.k_units
        return cls(((mask & grid.visible) | grid.always).expand(shape), grid)

    @classmethod
    def full(cls, chunk: Chunk) -> Plan:
        """Dense attention."""
        return cls.forced(chunk.grid.visible, chunk.grid, chunk.num_kv_heads)

    def density(self) -> torch.Tensor:
        """Share of the (block, unit) pairs with causal pairs in them that are computed, float32 [heads]; a partly
        filled block or unit counts as one."""
        return self.mask.sum((1, 2)) / self.grid.visible.sum()

    def dense_from(self, row: int) -> Plan:
        """This plan, and all there is for the blocks from this row of the chunk on."""
        if row >= self.grid.q_len:
            return self
        late = torch.arange(self.grid.q_blocks, device=self.mask.device) * ROWS >= row
        return Plan.forced(self.mask | late[:, None], self.grid)

    def by_kv_head(self, num_kv_heads: int) -> Plan:
        """What the query heads of each group need between them, for executors that read keys once for a group."""
        return Plan(self.mask.unflatten(0, (num_kv_heads, -1)).any(1), self.grid)


class PatternArgs(Arguments):
    """Arguments that every pattern takes. Unknown fields are errors."""

    # Measured: docs/results.md, "CUDA: sparse prefill".
    min_context: int = Field(16384, ge=0, description="Chunks that see fewer tokens are attended densely.")
    dense_layers: int = Field(0, ge=0, description="First layers, which are attended densely.")
    dense_last: int = Field(0, ge=0, description="Last tokens of a prompt, whose queries are attended densely.")


DenseRows = Callable[[Chunk, "torch.Tensor | Reader", torch.Tensor], torch.Tensor]
"""`dense_rows(chunk, values, rows)`: dense attention of some of a chunk's queries, int64 [m], counted from its start.

Returns float32 [m, num_heads, head_dim]. `attention_plugins.prefill.attention.dense_rows` is one.
"""


class Pattern(Method):
    """Decides which blocks of a prompt's attention are computed; the cache holds the whole prompt afterwards.

    Subclasses set the class attributes, may extend `Args`, and are registered in `attention_plugins.prefill.registry`
    or through the entry-point group `longreach.prefill`. They never see vLLM.

    What all have in common: the first 128 keys and each block's own are computed, the decision is made anew for each
    chunk, from that chunk's queries, and scores that aren't numbers keep what they belong to.
    """

    needs_training: ClassVar[bool] = False
    """Whether models have to be trained with it: others lose what it leaves out."""
    needs_calibration: ClassVar[bool] = False
    """Whether it wants tables of `longreach calibrate`. The class says what it does without."""
    per_kv_head: ClassVar[bool] = False
    """Whether the query heads of a group share a plan."""
    chunk_exact: ClassVar[bool] = False
    """Whether cutting a prompt at multiples of 128 tokens changes nothing. No mask of blocks survives other cuts, since
    they make other blocks. The class says what differs where this is False."""
    corrects: ClassVar[bool] = False
    """Whether `correct` does something."""

    class Args(PatternArgs):
        """See `PatternArgs`."""

    args: Any

    def __init__(self, args: Arguments) -> None:
        self.args = args

    def applies(self, layer: int, k_len: int) -> bool:
        """Whether a chunk is worth planning; it is attended densely otherwise."""
        return layer >= self.args.dense_layers and k_len >= max(self.args.min_context, 2 * ROWS)

    @abstractmethod
    def plan(self, chunk: Chunk) -> Plan:
        """What is computed of this chunk. Waits for nothing on the GPU, unless the class says so."""

    def planned(self, chunk: Chunk) -> Plan:
        """`plan`, and what `dense_last` adds: whole blocks of 128 queries, so often a few more. The prompt's length has
        to be known before its last chunk, or only that chunk's rows are dense."""
        plan, last = self.plan(chunk), self.args.dense_last
        return plan.dense_from(chunk.block_of(chunk.prompt_end - last)) if last else plan

    def correct(
        self,
        chunk: Chunk,
        values: torch.Tensor | Reader,
        plan: Plan,
        out: torch.Tensor,
        carry: torch.Tensor | None,
        dense_rows: DenseRows,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Make up for what the plan left out.

        Args:
            values: [num_kv_heads, k_len, head_dim], or what reads them.
            out: [q_len, num_heads, head_dim], of the plan.
            carry: what the same layer of the same request's chunk before returned; None for a request's first.

        Returns:
            The output, float32, and what the next chunk gets.
        """
        return out, None

    @classmethod
    def describe(cls) -> dict[str, Any]:
        return {
            **super().describe(),
            "needs_training": cls.needs_training,
            "needs_calibration": cls.needs_calibration,
            "per_kv_head": cls.per_kv_head,
            "chunk_exact": cls.chunk_exact,
        }
