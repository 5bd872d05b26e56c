"""Pages: how they are numbered, and in which order a page's numbers lie inside it."""

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

    def copy_tokens(self, pages: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy keys and values of single tokens, bits unchanged; all are read before any is written.

        Args:
            pages: the whole cache, [num_pages, 2 * page_size * head_dim].
            source, target: int64 [n], slots: `page * page_size + place in the page`.
        """

    def write_tokens(self, pages: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write keys and values of single tokens, each [n, head_dim] in the dtype of `pages`; no slot comes twice."""

    def read_tokens(self, pages: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of `write_tokens`: copies of keys and values, each [n, head_dim]; a slot may come twice."""


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

    def copy_tokens(self, pages: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        flat = pages.view(-1)
        flat[self._elements(target)] = flat[self._elements(source)]

    def write_tokens(self, pages: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        pages.view(-1)[self._elements(slots)] = torch.cat([keys, values], -1)

    def read_tokens(self, pages: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = pages.view(-1)[self._elements(slots)].split(self.head_dim, -1)
        return keys, values

    def _elements(self, slots: torch.Tensor) -> torch.Tensor:
        """Places of the slots' elements in the cache: int64 [n, 2 * head_dim]."""
        by_token = self.order.view(2, self.page_size, self.head_dim).transpose(0, 1).flatten(1)
        return (slots // self.page_size * self.order.numel())[:, None] + by_token[slots % self.page_size]


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

    def copy_tokens(self, pages: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        tokens = pages.view(-1, 2 * self.head_dim)
        tokens.index_copy_(0, target, tokens.index_select(0, source))

    def write_tokens(self, pages: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        pages.view(-1, 2 * self.head_dim).index_copy_(0, slots, torch.cat([keys, values], -1))

    def read_tokens(self, pages: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = pages.view(-1, 2 * self.head_dim).index_select(0, slots).split(self.head_dim, -1)
        return keys, values
