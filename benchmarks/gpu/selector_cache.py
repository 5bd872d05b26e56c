"""A random cache of 8B shapes for `benchmarks.gpu.selector_kernels`: some layers, rows of one length, lists of tokens
and of pages."""

from __future__ import annotations

from dataclasses import replace

import torch

from attention_plugins import kernels
from attention_plugins.decode.rows import DecodeRows, LayerCache, Mode
from kvcache.evidence import QuantScales
from kvcache.pages import InterleavedCodec, PageGeometry
from kvcache.tables import PageTables

SELECT = Mode.SELECT


class FakeCache:
    """Attributes:
    rows: all in mode SELECT.
    layers: `LayerCache`s whose pages lie in one tensor.
    content: as FlashAttention takes it, [num_pages, page_size, 1, 2 * head_dim].
    queries: [n, num_kv_heads, group, head_dim].
    """

    def __init__(
        self,
        context: int,
        batch: int,
        *,
        layers: int = 8,
        heads: int = 8,
        group: int = 4,
        dim: int = 128,
        page: int = 16,
        max_context: int = 131072,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cuda",
    ) -> None:
        self.context, self.batch, self.page, self.dim, self.heads, self.group = context, batch, page, dim, heads, group
        blocks = -(-context // page)
        total = blocks * batch
        base = tuple(layer * total * heads for layer in range(layers))
        self.geometry = PageGeometry(base, heads, heads, page, dim)
        stored = torch.empty(layers * total * heads, 2 * page * dim, dtype=dtype, device=device)
        # Layer by layer: what `normal_` needs beside its result would be much.
        for part in stored.chunk(layers):
            part.normal_()
        codec, scale = InterleavedCodec(page, dim), dim**-0.5
        self.layers = [LayerCache(layer, stored, self.geometry, codec, QuantScales(), scale) for layer in range(layers)]
        self.content = stored.view(-1, page, 1, 2 * dim)
        self.tables = PageTables(self.geometry, slots=1, width=1, device=device)

        def numbers(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        table = torch.zeros(batch, max_context // page, dtype=torch.int32, device=device)
        table[:, :blocks] = torch.randperm(total, device=device).view(batch, blocks)
        self.rows = DecodeRows(
            tables=self.tables,
            slots=numbers([self.tables.identity] * batch),
            seq_lens=numbers([context] * batch),
            block_table=table,
            modes=numbers([int(SELECT)] * batch),
            tokens=numbers([0] * batch),
            starts=numbers([row * blocks * page for row in range(batch)]),
            places=numbers(list(range(batch))),
            pooling=numbers([10] * batch),
            thresholds=torch.zeros(batch, device=device),
        )
        self.columns = batch * blocks * page
        self.queries = torch.randn(batch, heads, group, dim, device=device).to(dtype)
        self.device = torch.device(device)

    @property
    def shape(self) -> tuple[int, int]:
        return self.batch, self.heads

    def with_tokens(self, k: int) -> DecodeRows:
        return replace(self.rows, tokens=torch.full_like(self.rows.tokens, k))

    def empty(self, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def scores(self, columns: int) -> torch.Tensor:
        return torch.randn(self.heads, columns, device=self.device)

    def token_lists(self, k: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Slots int32 [n, heads, k + 16] and their counts, of random tokens and the newest: a pair for each of the
        layers in turn."""
        lists = []
        for index in range(count):
            slots, counts = self.empty(*self.shape, k + 16), self.empty(*self.shape)
            cache = self.layers[index % len(self.layers)]
            scores = self.scores(self.columns)
            kernels.top_slots(slots, counts, scores, self.with_tokens(k), cache, SELECT, self.rows.places)
            lists.append((slots, counts))
        return lists

    def page_lists(self, k: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Page tables int32 [n * heads, ceil(k / page size)] and lengths, likewise."""
        lists = []
        for index in range(count):
            pages, lengths = (
                self.empty(self.batch * self.heads, -(-k // self.page)),
                self.empty(self.batch * self.heads),
            )
            cache = self.layers[index % len(self.layers)]
            scores = self.scores(self.columns // self.page)
            kernels.top_pages(pages, lengths, scores, self.with_tokens(k), cache, SELECT)
            lists.append((pages, lengths))
        return lists
