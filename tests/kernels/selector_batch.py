"""A batch of every kind of row, for tests of what selectors are made of: naive twins and kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attention_plugins import naive
from attention_plugins.decode.rows import DecodeRows, LayerCache, Mode
from attention_plugins.page_rows import page_rows
from kvcache.evidence import QuantScales, dequantise
from kvcache.pages import InterleavedCodec, PageCodec, PageGeometry, PermutedCodec
from kvcache.tables import PageTables

LAYERS, LAYER = 3, 1
EVERY = Mode.DENSE | Mode.SELECT | Mode.REUSE
UNTOUCHED = -7


@dataclass(frozen=True)
class Row:
    """A request of a batch, or none (length 0)."""

    length: int
    mode: Mode = Mode.SELECT
    tokens: int = 8
    compacted: int = 0
    """Target blocks, handed out to layers and heads unequally; as many blocks of the prompt are gone, and one more."""


MIXED = (
    Row(37),
    Row(0),
    Row(61, compacted=3, tokens=20),
    Row(16, Mode.DENSE),
    Row(1),
    Row(50, Mode.REUSE, tokens=9),
    Row(0),
    Row(33, Mode.DENSE, compacted=2),
    Row(64, tokens=1000),
    Row(90, compacted=5, tokens=33),
)


@dataclass
class Batch:
    """Rows over one layer of a cache; whatever isn't a token of theirs is NaN.

    Attributes:
        keys, values: what was written, real numbers: by row and head, float32 [length, dim].
        slots: where, by row and head.
    """

    given: Sequence[Row] = MIXED
    heads: int = 2
    group: int = 3
    dim: int = 16
    page: int = 4
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    permuted: bool = False
    quant: QuantScales = field(default_factory=QuantScales)
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        h, blocks = self.heads, max(-(-row.length // self.page) for row in self.given) + 2
        total = sum(blocks + row.compacted for row in self.given)
        self.geometry = PageGeometry(tuple(layer * h for layer in range(LAYERS)), LAYERS * h, h, self.page, self.dim)
        self.tables = PageTables(self.geometry, slots=len(self.given), width=8, device=self.device)
        free, n = torch.randperm(total, generator=self.generator), len(self.given)
        table, starts, slots, column = torch.zeros(n, blocks, dtype=torch.int32), [], [], 0
        for index, row in enumerate(self.given):
            table[index], free = free[:blocks], free[blocks:]
            pages = LAYERS * h * row.compacted
            slot = self.tables.identity if row.length else -1
            if row.compacted:
                counts = torch.bincount(
                    torch.randint(0, LAYERS * h, (pages,), generator=self.generator), minlength=LAYERS * h
                )
                slot = self.tables.take(
                    counts.view(LAYERS, h), free[: row.compacted].to(self.device), row.compacted + 1
                )
                free = free[row.compacted :]
            slots.append(slot)
            starts.append(column)
            longest = int(self.tables.counts[slot].max()) if row.compacted else 0
            column += (-(-row.length // self.page) + longest) * self.page
        self.columns = max(column, 1)
        codec: PageCodec = InterleavedCodec(self.page, self.dim)
        if self.permuted:
            order = torch.randperm(2 * self.page * self.dim, generator=self.generator)
            codec = PermutedCodec(order, self.page, self.dim)
        fp8 = self.dtype.itemsize == 1
        shape = (total * LAYERS * h, 2 * self.page * self.dim)
        contents = torch.full(shape, 0x7F if fp8 else math.nan, dtype=self.dtype, device=self.device)
        self.cache = LayerCache(LAYER, contents, self.geometry, codec, self.quant, self.dim**-0.5)

        def numbers(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        # A part of a wider table, as vLLM gives.
        wide = torch.cat([table, table], 1).to(self.device)
        self.rows = DecodeRows(
            tables=self.tables,
            slots=numbers(slots),
            seq_lens=numbers([row.length for row in self.given]),
            block_table=wide[:, :blocks],
            modes=numbers([int(row.mode) if row.length else 0 for row in self.given]),
            tokens=numbers([row.tokens for row in self.given]),
            starts=numbers(starts),
            places=numbers([index if row.length else -1 for index, row in enumerate(self.given)]),
            pooling=numbers([index % 4 for index in range(len(self.given))]),
            thresholds=torch.zeros(len(self.given), device=self.device),
        )
        self._write()

    def _write(self) -> None:
        rows, n = self.rows, len(self.given)
        found, lengths = page_rows(self.tables, rows.slots, rows.seq_lens, rows.block_table)
        self.keys: list[list[torch.Tensor]] = []
        self.values: list[list[torch.Tensor]] = []
        self.slots: list[list[torch.Tensor]] = []
        for index in range(n):
            parts: tuple[list[torch.Tensor], ...] = ([], [], [])
            for head in range(self.heads):
                at = index * self.heads + head
                place = torch.arange(int(lengths[LAYER, at]), device=self.device)
                slots = found[LAYER, at].long()[place // self.page] * self.page + place % self.page
                keys, values = (self.random(len(slots), self.dim) for _ in range(2))
                self.cache.codec.write_tokens(self.cache.pages, slots, keys, values)
                real = dequantise(keys, self.quant.key).float(), dequantise(values, self.quant.value).float()
                for part, new in zip(parts, (slots, *real), strict=True):
                    part.append(new)
            self.slots.append(parts[0])
            self.keys.append(parts[1])
            self.values.append(parts[2])

    def random(self, *shape: int) -> torch.Tensor:
        """Normal numbers in the cache's dtype."""
        numbers = torch.randn(shape, generator=self.generator)
        if self.dtype.itemsize == 1:
            return numbers.to(torch.float8_e4m3fn).view(self.dtype).to(self.device)
        return numbers.to(self.device, self.dtype)

    def queries(self, dim: int | None = None, fp8: bool = False) -> torch.Tensor:
        """[n, heads, group, dim], in the model's dtype: bfloat16 where the cache is fp8."""
        dtype = self.dtype if self.dtype.itemsize > 1 else torch.bfloat16
        numbers = torch.randn(len(self.given), self.heads, self.group, dim or self.dim, generator=self.generator)
        return numbers.to(self.device, torch.float8_e4m3fn if fp8 else dtype)

    def scores(self, columns: int | None = None, ties: bool = False) -> torch.Tensor:
        """Random scores for every column; few different ones make ties."""
        made = torch.randn(self.heads, columns or self.columns, generator=self.generator)
        return ((made * 2).round() / 2 if ties else made).to(self.device)

    def filled(self, value: float, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=self.device)

    def wanted(self, want: int) -> list[int]:
        return [index for index, row in enumerate(self.given) if row.length and row.mode & want]

    def all_pages(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages of all rows' tokens and how many slots of each are written: int64 [m] each."""
        slots = torch.cat([slots for heads in self.slots for slots in heads])
        pages, filled = (slots // self.page).unique(return_counts=True)
        return pages, filled

    def lists(self, *more: int) -> torch.Tensor:
        """Untouched, one for each row and head."""
        return self.filled(UNTOUCHED, len(self.given), self.heads, *more)


def both(
    name: str, outputs: list[torch.Tensor], *arguments: Any, **options: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a kernel and its twin make of copies of the same outputs, their first arguments."""
    from attention_plugins import kernels

    found, expected = ([tensor.clone() for tensor in outputs] for _ in range(2))
    getattr(kernels, name)(*found, *arguments, **options)
    getattr(naive, name)(*expected, *arguments, **options)
    return found, expected


def assert_same(name: str, outputs: list[torch.Tensor], *arguments: Any, **options: Any) -> list[torch.Tensor]:
    found, expected = both(name, outputs, *arguments, **options)
    for one, other in zip(found, expected, strict=True):
        assert one.tolist() == other.tolist()
    return found


def assert_close(name: str, outputs: list[torch.Tensor], *arguments: Any, **options: Any) -> None:
    """Both multiply the same numbers exactly and add in float32; what differs is the order."""
    torch.testing.assert_close(*both(name, outputs, *arguments, **options), rtol=1e-4, atol=1e-4)
