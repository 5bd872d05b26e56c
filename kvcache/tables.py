"""Page tables of compacted requests: which page is whose, and how many slots of it are in use."""

from __future__ import annotations

import torch

from kvcache.pages import PageGeometry


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Send a tensor of the CPU to a device without waiting."""
    pinned = device.type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Send a tensor to the CPU without waiting, in order with the work that makes it."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)


class PageTables:
    """The tables of all compacted requests, in tensors of fixed size and place, so that CUDA graphs may read them.

    A request's target blocks are one pool of pages, ordered by layer, then head, then block. Layer after layer and
    head after head takes its share from the front of what is left, so a table is a function of the target blocks and
    of the number of pages of each layer and head; no page number is ever stored. Behind its compacted pages, each
    head has one page for every block appended since: the prompt's tail and all new tokens.

    Attributes:
        blocks: int32 [slots, width], each request's target blocks.
        num_blocks: int32 [slots], how many of them there are.
        first_block: int32 [slots], logical number of the first block that stays: the tail's.
        counts: int32 [slots, num_layers, num_kv_heads], compacted pages.
        starts: int32 [slots, num_layers, num_kv_heads], place of the first of them in the request's pool.
        layer_base: int32 [num_layers], the geometry's.
        identity: the slot of all requests that aren't compacted: no pages, and every block is appended.
    """

    def __init__(self, geometry: PageGeometry, *, slots: int, width: int, device: torch.device | str = "cpu") -> None:
        """
        Args:
            geometry: of the cache.
            slots: most requests that are compacted at the same time.
            width: most target blocks of a request.
            device: the cache's.
        """

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.geometry, self.identity = geometry, slots
        self.blocks = zeros(slots + 1, width)
        self.num_blocks = zeros(slots + 1) + 1  # a slot that nobody has is read too, and divided by
        self.first_block = zeros(slots + 1)
        self.counts = zeros(slots + 1, geometry.num_layers, geometry.num_kv_heads)
        self.starts = torch.zeros_like(self.counts)
        self.layer_base = torch.tensor(geometry.layer_base, dtype=torch.int32, device=device)
        self._free = list(range(slots - 1, -1, -1))

    @staticmethod
    def nbytes(num_layers: int, num_kv_heads: int, slots: int, width: int) -> int:
        """Memory that tables of this size take."""
        return 4 * (slots + 1) * (width + 2 + 2 * num_layers * num_kv_heads)

    def take(self, counts: torch.Tensor, blocks: torch.Tensor, first_block: int) -> int:
        """Give a request its table and return the table's slot.

        Args:
            counts: int64 [num_layers, num_kv_heads], on the CPU.
            blocks: int64 [n], on the tables' device; all their pages are handed out.

        Raises:
            ValueError: counts and blocks disagree, or there are more blocks than fit.
            RuntimeError: more requests than slots.
        """
        pool = blocks.numel() * self.geometry.num_layers * self.geometry.num_kv_heads
        if int(counts.sum()) != pool:
            raise ValueError(f"{int(counts.sum())} pages wanted, the pool has {pool}")
        if blocks.numel() > self.blocks.shape[1]:
            raise ValueError(f"{blocks.numel()} target blocks, a table has room for {self.blocks.shape[1]}")
        if not self._free:
            raise RuntimeError(f"all {self.identity} page tables are in use")
        slot = self._free.pop()
        device = self.blocks.device
        self.blocks[slot, : blocks.numel()] = blocks
        self.num_blocks[slot].fill_(blocks.numel())  # assigning a number would wait for the device
        self.first_block[slot].fill_(first_block)
        self.counts[slot] = to_device(counts.int(), device)
        starts = counts.flatten().cumsum(0) - counts.flatten()
        self.starts[slot] = to_device(starts.view_as(counts).int(), device)
        return slot

    def prompt_pages(self, blocks: torch.Tensor) -> torch.Tensor:
        """Pages of whole blocks, in their order: int64 [n] -> int64 [num_layers, num_kv_heads, n]."""
        heads = torch.arange(self.geometry.num_kv_heads, device=blocks.device)[:, None]
        return self.layer_base[:, None, None] + heads + blocks * self.geometry.block_stride

    def answer_pages(self, slot: int, counts: torch.Tensor, appended: torch.Tensor) -> torch.Tensor:
        """Pages of a request in the order of their tokens, those of appended blocks behind the compacted ones.

        Args:
            counts: int64 [num_layers, num_kv_heads], on the CPU: the request's.
            appended: int64 [n], on the tables' device: blocks from `first_block` on.

        Returns:
            int64 [num_layers, num_kv_heads, width]; what is behind a row's pages is any page.
        """
        g, device = self.geometry, self.blocks.device
        column = torch.arange(int(counts.max()) + appended.numel(), device=device)
        count = self.counts[slot].long()[..., None]
        pool = int(counts.sum()) - 1
        kept = self.pool_pages(slot, (self.starts[slot].long()[..., None] + column).clamp(max=pool))
        later = appended[(column - count).clamp(0, appended.numel() - 1)] * g.block_stride
        heads = torch.arange(g.num_kv_heads, device=device)[:, None]
        return torch.where(column < count, kept, self.layer_base[:, None, None] + heads + later)

    def advance(self, slot: int, first_block: int) -> None:
        """From now on this is the logical number of the first block that isn't compacted."""
        self.first_block[slot].fill_(first_block)

    def release(self, slot: int) -> None:
        self._free.append(slot)

    def pool_pages(self, slot: int, index: torch.Tensor) -> torch.Tensor:
        """Pages at these places of a request's pool: int64 of any shape in and out."""
        blocks, n, g = self.blocks[slot], self.num_blocks[slot], self.geometry
        head, layer = index // n % g.num_kv_heads, index // (n * g.num_kv_heads)
        return self.layer_base[layer].long() + blocks[index % n].long() * g.block_stride + head

    def token_slots(self, slot: int, row: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
        """Where a request's compacted tokens lie: `page * page_size + place in the page`.

        Args:
            row: int64 [n], layer * num_kv_heads + head.
            rank: int64 [n], which of the row's tokens.
        """
        size = self.geometry.page_size
        return self.pool_pages(slot, self.starts[slot].flatten()[row] + rank // size) * size + rank % size
