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


class TableStore:
    """The page tables of all compacted requests in one tensor, so that a batch's are gathered in one go.

    Attributes:
        pages: int32 [num_layers, slots, num_kv_heads, width], on the cache's device.
        offsets: int32 [num_layers, slots, num_kv_heads], on the CPU: physical less logical length.
    """

    def __init__(self, geometry: PageGeometry, device: torch.device, slots: int = 16, width: int = 64) -> None:
        shape = (geometry.num_layers, slots, geometry.num_kv_heads)
        self.pages = torch.zeros(*shape, width, dtype=torch.int32, device=device)
        self.offsets = torch.zeros(shape, dtype=torch.int32)
        self._free = list(range(slots))

    def take(self, width: int) -> int:
        """A free slot with room for rows of `width` pages; the store grows when there is none."""
        slots = self.pages.shape[1]
        if not self._free:
            self.pages = torch.cat([self.pages, torch.zeros_like(self.pages)], 1)
            self.offsets = torch.cat([self.offsets, torch.zeros_like(self.offsets)], 1)
            self._free = list(range(slots, 2 * slots))
        self.widen(width)
        return self._free.pop()

    def widen(self, width: int) -> None:
        """Make room for rows of `width` pages."""
        missing = width - self.pages.shape[-1]
        if missing > 0:
            self.pages = torch.nn.functional.pad(self.pages, (0, max(missing, self.pages.shape[-1])))

    def release(self, slot: int) -> None:
        self._free.append(slot)


class PageTable:
    """The pages of one compacted request, in reading order, for every layer and KV head.

    First come its compacted pages (their number differs by layer and head), then one page for each block appended
    since: the prompt's tail and all new tokens.
    """

    def __init__(
        self,
        geometry: PageGeometry,
        counts: torch.Tensor,
        pool: torch.Tensor,
        first_block: int,
        store: TableStore | None = None,
    ) -> None:
        """Hand out a pool of pages.

        Args:
            geometry: of the cache.
            counts: int64 [num_layers, num_kv_heads], on the CPU, compacted pages of each; their sum is
                `pool.numel()`.
            pool: int64, the pages to hand out, in order; its device is the table's.
            first_block: logical number of the first block that stays: the tail's.
            store: where the table is kept; left out, one of its own.

        Raises:
            ValueError: when counts and pool disagree.
        """
        if int(counts.sum()) != pool.numel():
            raise ValueError(f"{int(counts.sum())} pages wanted, the pool has {pool.numel()}")
        self.geometry, self.counts, self.first_block = geometry, counts, first_block
        self.num_appended = 0
        self.most = int(counts.max())
        self.store = store or TableStore(geometry, pool.device, slots=1)
        self.slot = self.store.take(self.most + 8)
        self.store.offsets[:, self.slot] = ((counts - first_block) * geometry.page_size).int()
        taken = torch.arange(self.most) < counts[..., None]
        self.store.pages[:, self.slot, :, : self.most][taken.to(pool.device)] = pool.int()
        self._next = counts[..., None].to(pool.device)

    @property
    def width(self) -> int:
        """Pages of the longest row."""
        return self.most + self.num_appended

    def compacted(self, layer: int) -> torch.Tensor:
        """The compacted pages of one layer, head by head: int64 [sum of the layer's counts]."""
        rows = self.store.pages[layer, self.slot]
        return torch.cat([row[:count] for row, count in zip(rows, self.counts[layer].tolist(), strict=True)]).long()

    def append(self, blocks: torch.Tensor) -> None:
        """Take note of the blocks that hold the tail and the new tokens: int [n], all of them, in order."""
        new = blocks[self.num_appended :].long()
        if not len(new):
            return
        self.store.widen(self.most + len(blocks))
        pages = torch.stack([self.geometry.pages_of(layer, new) for layer in range(self.geometry.num_layers)])
        at = self._next + self.num_appended + torch.arange(len(new), device=new.device)
        self.store.pages[:, self.slot].scatter_(-1, at, pages.int())
        self.num_appended += len(new)

    def physical_lengths(self, logical_length: int) -> torch.Tensor:
        """Slots in use when `logical_length` tokens have been seen: int32 [num_layers, num_kv_heads], on the CPU."""
        return self.store.offsets[:, self.slot] + logical_length

    def rows(self) -> torch.Tensor:
        """int32 [num_layers, num_kv_heads, width]; entries past a row's pages mean nothing."""
        return self.store.pages[:, self.slot, :, : self.width]

    def release(self) -> None:
        """Give the slot back; the table must not be used after."""
        self.store.release(self.slot)
