"""Page numbers and page tables as plain lists, without a line of the code under test."""

from __future__ import annotations

from dataclasses import dataclass

from kvcache.pages import PageGeometry

LAYERS, HEADS, BLOCKS, PAGE = 3, 2, 50, 4
BLOCK_MAJOR = PageGeometry(tuple(HEADS * layer for layer in range(LAYERS)), HEADS * LAYERS, HEADS, PAGE, 8)
LAYER_MAJOR = PageGeometry(tuple(HEADS * BLOCKS * layer + 5 for layer in range(LAYERS)), HEADS, HEADS, PAGE, 8)


def page_of(geometry: PageGeometry, layer: int, block: int, head: int) -> int:
    if geometry is BLOCK_MAJOR:
        return (block * LAYERS + layer) * HEADS + head
    assert geometry is LAYER_MAJOR
    return 5 + (layer * BLOCKS + block) * HEADS + head


def grid() -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]


@dataclass(frozen=True)
class PlainTable:
    """A compacted request: how many pages each (layer, head) has, its target blocks, the first block that stays."""

    geometry: PageGeometry
    counts: list[list[int]]
    blocks: list[int]
    first_block: int

    def pool(self) -> list[int]:
        return [page_of(self.geometry, layer, block, head) for layer, head in grid() for block in self.blocks]

    def pages(self, layer: int, head: int, length: int, block_table: list[int]) -> list[int]:
        """Pages of one layer and head, in reading order, when `length` tokens have been seen."""
        before = sum(self.counts[i][j] for i, j in grid() if (i, j) < (layer, head))
        kept = self.pool()[before : before + self.counts[layer][head]]
        later = block_table[self.first_block : -(-length // PAGE)]
        return kept + [page_of(self.geometry, layer, block, head) for block in later]

    def slots_in_use(self, layer: int, head: int, length: int) -> int:
        return self.counts[layer][head] * PAGE + length - self.first_block * PAGE
