"""The selector interface: what a request asks for (`Selector`), and what a worker does for it (`Reader`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from attention_plugins.decode.rows import DecodeRows, LayerCache, Mode
from kvcache.evidence import LayerEvidence
from kvcache.method import Arguments, Method, Odd
from kvcache.pages import PageGeometry
from kvcache.tables import to_device

if TYPE_CHECKING:
    from attention_plugins.decode.schedule import Read

KERNEL = 21
"""Width of the pooling of scores, as SnapKV's here: parts of a number, a name or a line are chosen together."""
MOST_TOKENS = 4096
"""Largest K of a request: what lists of selected tokens have room for."""


def shortest(tokens: int) -> Any:
    """The argument `min_context`: where a selector breaks even with dense attention, one request alone, 8B shapes on an
    H100 (docs/results.md); with more requests at once that is earlier."""
    return Field(tokens, ge=0, description="Shorter contexts are read whole: there this costs more time than it saves.")


def pooled(width: int) -> Any:
    """The argument `kernel`: over how many tokens scores are pooled, unless a request says otherwise."""
    return Field(
        width,
        ge=1,
        le=127,
        description="Tokens over which scores are max-pooled before the choice; odd, 1: not at all.",
    )


class SelectorArgs(Arguments):
    """Arguments that every selector takes. Unknown fields are errors."""

    tokens: int = Field(
        2048, ge=32, le=MOST_TOKENS, description="Tokens of the context that a KV head reads at each step (K)."
    )
    min_context: int = shortest(16384)


class ListArgs(SelectorArgs):
    """Of selectors that choose single tokens by what attention gives them."""

    kernel: Odd = pooled(KERNEL)


class Selector(Method):
    """Decides what each step of decoding reads; frees nothing, so the whole context stays within reach.

    Subclasses set the class attributes, may extend `Args`, and are registered in `attention_plugins.decode.registry` or
    through the entry-point group `longreach.decode`. They never see vLLM.
    """

    reader: ClassVar[type[Reader]]
    """What does the work."""
    keeps_state: ClassVar[bool] = False
    """Whether a worker remembers something of each request from step to step."""
    prepares: ClassVar[bool] = False
    """Whether the reader wants to see a request's pages before its first step, and after each compaction."""
    keeps_metadata: ClassVar[bool] = False
    """Whether a worker holds something for each page of the cache, used or not."""
    with_policies: ClassVar[bool] = True
    """Whether it works over compressed caches, whose layers and heads hold different tokens."""
    with_tensor_parallel: ClassVar[bool] = True
    """Whether a part of the heads is enough to select by."""
    needs_calibration: ClassVar[bool] = False
    """Whether the server has to be given a file of `longreach calibrate` for it."""

    class Args(SelectorArgs):
        """See `SelectorArgs`."""

    args: Any

    def __init__(self, args: SelectorArgs) -> None:
        self.args = args

    @property
    def pooling(self) -> int:
        """Over how many places to either side a token's score counts for others."""
        return int(getattr(self.args, "kernel", 1)) // 2

    @property
    def threshold(self) -> float:
        """The one number that a reader gets to see of a row, beside K."""
        return 0.0

    @property
    def window(self) -> int:
        """How many of a prompt's last queries the reader wants to select by before the first step; 0: none."""
        return 0

    @property
    def wants_state(self) -> bool:
        """Whether this request needs one of the states, of which there are few."""
        return self.keeps_state

    @property
    def pinned(self) -> int:
        """How many of the tokens that these queries choose stay on its lists."""
        return 0

    def mode(self, context: int, since: int | None) -> Mode:
        """What a step does.

        Args:
            context: tokens that there are to read, the step's own included.
            since: how many steps ago something was selected, 1 for the step before; 0: the prompt's last queries are
                there to select by; None: never, or what was selected is gone.
        """
        return Mode.DENSE if context <= max(self.args.tokens, self.args.min_context) else Mode.SELECT

    @classmethod
    def describe(cls) -> dict[str, Any]:
        return {
            **super().describe(),
            "keeps_state": cls.keeps_state,
            "keeps_metadata": cls.keeps_metadata,
            "with_policies": cls.with_policies,
            "with_tensor_parallel": cls.with_tensor_parallel,
            "needs_calibration": cls.needs_calibration,
        }


@dataclass(frozen=True)
class Place:
    """Where a reader works.

    Attributes:
        geometry: of the cache's pages.
        num_pages: of all layers, blocks and heads.
        group: query heads of a KV head.
        dtype: the model's.
        device: the cache's.
        rows: most requests of a step.
        states: most requests that state is kept of.
        width: pages of the longest row.
        capacity: tokens of all selecting rows of a step, per KV head.
        tokens: largest K.
        calibration: what `longreach calibrate` found for this model, by name; empty without it.
    """

    geometry: PageGeometry
    num_pages: int
    group: int
    dtype: torch.dtype
    device: torch.device
    rows: int
    states: int
    width: int
    capacity: int
    tokens: int = MOST_TOKENS
    calibration: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Buffers:
    """Tensors that all readers and layers use in their turn; fixed places, for CUDA graphs.

    Attributes:
        pages: int32 [rows * num_kv_heads, width], a layer's page table.
        lengths: int32 [rows * num_kv_heads].
        scores: float32 [num_kv_heads, capacity], of tokens or pages.
        pooled: the same, pooled.
    """

    pages: torch.Tensor
    lengths: torch.Tensor
    scores: torch.Tensor
    pooled: torch.Tensor

    @classmethod
    def make(cls, place: Place) -> Buffers:
        heads, device = place.geometry.num_kv_heads, place.device
        return cls(
            torch.zeros(place.rows * heads, place.width, dtype=torch.int32, device=device),
            torch.zeros(place.rows * heads, dtype=torch.int32, device=device),
            torch.zeros(heads, place.capacity, device=device),
            torch.zeros(heads, place.capacity, device=device),
        )

    @staticmethod
    def nbytes(place: Place) -> int:
        return 4 * place.geometry.num_kv_heads * (place.rows * (place.width + 1) + 2 * place.capacity)


ReadPages = Callable[..., torch.Tensor]
"""`read_pages(out, queries, pages, lengths, cache)`: the platform's attention over page tables.

out, queries [n, num_kv_heads, group, head_dim]; pages int32 [n * num_kv_heads, width]; lengths int32, where 0 it
writes anything.
Returns the softmax's log denominators, float32 [n, num_kv_heads, group].
"""


class Reader(ABC):
    """A selector at work in one worker: its metadata of pages, its state of requests, what it does in a layer.

    Everything between `read`'s first and last line is captured in CUDA graphs: no waiting for the GPU, no shape that
    depends on data, no tensor kept that isn't made in `__init__`.
    """

    def __init__(self, place: Place, buffers: Buffers, ops: ModuleType, read_pages: ReadPages) -> None:
        """
        Args:
            ops: `attention_plugins.naive` or `attention_plugins.kernels`.
        """
        self.place, self.buffers, self.ops, self.read_pages = place, buffers, ops, read_pages

    @classmethod
    def nbytes(cls, place: Place) -> int:
        """Memory that it holds, `Buffers` not counted."""
        return 0

    def whole(self, modes: Mode) -> int:
        """0 where no row of a batch with these modes reads everything, else 1, or more where there are several ways.

        A CUDA graph is captured for each answer; readers to which it makes no difference have one.
        """
        return 1

    def prepare(self, pages: torch.Tensor, lengths: torch.Tensor, caches: list[LayerCache], state: int) -> None:  # noqa: B027
        """See a request's cache before its first step, and again after each compaction, where the selector `prepares`.

        Args:
            pages: int64 [num_layers, num_kv_heads, width], in the order of their tokens; what is behind a row's pages
                is any page.
            lengths: int64 [num_layers, num_kv_heads], tokens there, on the CPU.
            caches: by layer.
            state: the request's; -1 where none is kept.
        """

    def open(self, read: Read, pages: torch.Tensor, evidence: Callable[[int], LayerEvidence]) -> None:  # noqa: B027
        """Select by a prompt's last queries before the answer's first step, where the selector has a `window`.

        Args:
            read: the request's part of that step.
            pages: int64 [num_layers, num_kv_heads, width], the prompt's, in the order of its tokens.
            evidence: by layer, the prompt with its window.
        """

    def in_use(self, pages: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's pages that hold something, and how many tokens each: int64 [m].

        Args:
            pages: int64 [num_kv_heads, width].
            lengths: int64 [num_kv_heads], on the CPU.
        """
        size = self.place.geometry.page_size
        filled = (lengths[:, None] - torch.arange(pages.shape[1]) * size).clamp(0, size)
        head, column = filled.nonzero(as_tuple=True)
        at = to_device(torch.stack([head, column, filled[head, column]]), pages.device)
        return pages[at[0], at[1]], at[2]

    @abstractmethod
    def read(self, out: torch.Tensor, queries: torch.Tensor, rows: DecodeRows, cache: LayerCache, whole: int) -> None:
        """One layer's attention of a step.

        Args:
            out: [n, num_kv_heads, group, head_dim], written.
            queries: the same shape, post-RoPE.
            whole: what the method `whole` said of the batch.
        """

    def read_whole(
        self, out: torch.Tensor, queries: torch.Tensor, rows: DecodeRows, cache: LayerCache, want: int
    ) -> torch.Tensor:
        """Dense attention of the rows whose mode is wanted; what it writes for the others means nothing.

        Returns:
            Log denominators, float32 [n, num_kv_heads, group].
        """
        pages, lengths = self.tables(len(rows))
        self.ops.full_rows(pages, lengths, rows, cache, want)
        return self.read_pages(out, queries, pages, lengths, cache)

    def tables(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's page table, for so many rows."""
        sequences = rows * self.place.geometry.num_kv_heads
        return self.buffers.pages[:sequences], self.buffers.lengths[:sequences]
