"""Pages: where the tokens of one layer and KV head lie, and in which order their numbers lie inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class PageGeometry:
    """Numbers every page of the KV cache: one flat index over all layers, blocks and KV heads.

    A block of vLLM's is one page for each layer and KV head, and all layers lie in one allocation, so a page can be
    lent to any other layer or head. The page of (layer, block, head) is `layer_base[layer] + block * block_stride
    + head`.
    """

    layer_base: tuple[int, ...]
    block_stride: int
    num_kv_heads: int
    page_size: int
    head_dim: int

    @property
    def num_layers(self) -> int:
        return len(self.layer_base)

    def pages_of(self, layer: int, blocks: torch.Tensor) -> torch.Tensor:
        """Pages of whole blocks: int64 [n] -> int64 [num_kv_heads, n]."""
        heads = torch.arange(self.num_kv_heads, device=blocks.device)
        return self.layer_base[layer] + heads[:, None] + blocks[None, :] * self.block_stride

    def pool_of(self, blocks: torch.Tensor) -> torch.Tensor:
        """All pages of these blocks, ordered by layer, then head, then block: int64 [n * num_layers * num_kv_heads]."""
        return torch.cat([self.pages_of(layer, blocks).flatten() for layer in range(self.num_layers)])


class PageCodec(Protocol):
    """How a page's keys and values are laid out; attention kernels have their own ways."""

    def unpack(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., 2 * page_size * head_dim] -> keys, values, each [..., page_size, head_dim]."""

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The inverse of `unpack`."""


@dataclass(frozen=True)
class PermutedCodec:
    """A page whose elements are those of [keys token by token, values token by token] in another order.

    `order[i]` is the place inside the page of element i; int64 [2 * page_size * head_dim], a permutation.
    """

    order: torch.Tensor
    page_size: int
    head_dim: int

    @classmethod
    def plain(cls, page_size: int, head_dim: int) -> PermutedCodec:
        """Keys token by token, then values token by token."""
        return cls(torch.arange(2 * page_size * head_dim), page_size, head_dim)

    def unpack(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        plain = pages[..., self.order].unflatten(-1, (2, self.page_size, self.head_dim))
        return plain[..., 0, :, :], plain[..., 1, :, :]

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        plain = torch.cat([keys.flatten(-2), values.flatten(-2)], dim=-1)
        packed = torch.empty_like(plain)
        packed[..., self.order] = plain
        return packed


@dataclass(frozen=True)
class InterleavedCodec:
    """A page that holds, token by token, the key and then the value: FlashAttention's."""

    page_size: int
    head_dim: int

    def unpack(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        content = pages.unflatten(-1, (self.page_size, 2 * self.head_dim))
        return content[..., : self.head_dim], content[..., self.head_dim :]

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.cat([keys, values], dim=-1).flatten(-2)


class PageTable:
    """The pages of one compacted request, in reading order, for every layer and KV head.

    First come its compacted pages (their number differs by layer and head), then one page for each block appended
    since: the prompt's tail and all new tokens.
    """

    def __init__(self, geometry: PageGeometry, counts: torch.Tensor, pool: torch.Tensor, first_block: int) -> None:
        """Hand out a pool of pages.

        Args:
            geometry: of the cache.
            counts: int64 [num_layers, num_kv_heads], on the CPU, compacted pages of each; their sum is
                `pool.numel()`.
            pool: int64, the pages to hand out, in order; its device is the table's.
            first_block: logical number of the first block that stays: the tail's.

        Raises:
            ValueError: when counts and pool disagree.
        """
        if int(counts.sum()) != pool.numel():
            raise ValueError(f"{int(counts.sum())} pages wanted, the pool has {pool.numel()}")
        self.geometry, self.counts, self.first_block = geometry, counts, first_block
        self.num_appended = 0
        self._table = torch.zeros(*counts.shape, int(counts.max()) + 8, dtype=torch.int32, device=pool.device)
        taken = torch.arange(self._table.shape[-1]) < counts[..., None]
        self._table[taken.to(pool.device)] = pool.int()
        self._next = counts[..., None].to(pool.device)

    def compacted(self, layer: int) -> torch.Tensor:
        """The compacted pages of one layer, head by head: int64 [sum of the layer's counts]."""
        heads = enumerate(self.counts[layer].tolist())
        return torch.cat([self._table[layer, head, :count] for head, count in heads]).long()

    def append(self, blocks: torch.Tensor) -> None:
        """Take note of the blocks that hold the tail and the new tokens: int [n], all of them, in order."""
        new = blocks[self.num_appended :].long()
        if not len(new):
            return
        needed = int(self.counts.max()) + len(blocks)
        if needed > self._table.shape[-1]:
            wider = torch.zeros(*self.counts.shape, 2 * needed, dtype=torch.int32, device=self._table.device)
            wider[..., : self._table.shape[-1]] = self._table
            self._table = wider
        pages = torch.stack([self.geometry.pages_of(layer, new) for layer in range(self.geometry.num_layers)])
        at = self._next + self.num_appended + torch.arange(len(new), device=new.device)
        self._table.scatter_(-1, at, pages.int())
        self.num_appended += len(new)

    def physical_lengths(self, logical_length: int) -> torch.Tensor:
        """Slots in use when `logical_length` tokens have been seen: int32 [num_layers, num_kv_heads], on the CPU."""
        page_size = self.geometry.page_size
        return (self.counts * page_size + logical_length - self.first_block * page_size).int()

    def rows(self) -> torch.Tensor:
        """int32 [num_layers, num_kv_heads, width]; entries past a row's pages are 0."""
        return self._table[..., : int(self.counts.max()) + self.num_appended]
