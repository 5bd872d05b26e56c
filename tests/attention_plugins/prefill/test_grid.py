"""The grid, against loops over tokens."""

from __future__ import annotations

import pytest
import torch

from attention_plugins.prefill.grid import Grid
from tests.device import DEVICE

CHUNKS = pytest.mark.parametrize(
    ("q_len", "k_len", "unit"), [(1, 1, 16), (300, 300, 16), (129, 500, 8), (256, 640, 128), (77, 401, 32)]
)


def grid_of(q_len: int, k_len: int, unit: int) -> Grid:
    return Grid(q_len, k_len, unit, DEVICE)


def brute(grid: Grid, seen: torch.Tensor) -> torch.Tensor:
    """What units hold: bool [q_len, k_len] -> bool [q_blocks, k_units]."""
    found = torch.zeros(grid.q_blocks, grid.k_units, dtype=torch.bool)
    for row, key in (seen & tokens(grid)[2]).nonzero().tolist():
        found[row // 128, key // grid.unit] = True
    return found


def tokens(grid: Grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions of rows [q_len, 1] and keys [k_len], and what is causal."""
    rows, keys = torch.arange(grid.offset, grid.k_len)[:, None], torch.arange(grid.k_len)
    return rows, keys, keys <= rows


@CHUNKS
def test_visible_and_bands(q_len: int, k_len: int, unit: int) -> None:
    grid = grid_of(q_len, k_len, unit)
    rows, keys, causal = tokens(grid)
    assert torch.equal(grid.visible, brute(grid, causal))
    for sinks, window in [(0, 1), (1, 1), (20, 33), (128, 200), (0, k_len)]:
        assert torch.equal(grid.band(sinks, window), brute(grid, (keys < sinks) | (rows - keys < window)))
    own = keys // unit >= (rows - (rows - grid.offset) % 128) // unit
    assert torch.equal(grid.always, brute(grid, own | (keys < 128)))
    coarse = grid_of(q_len, k_len, 128)
    assert torch.equal(grid.always_blocks, brute(coarse, own | (keys < 128)))


@CHUNKS
def test_from_tokens_blocks_and_diagonals(q_len: int, k_len: int, unit: int) -> None:
    grid = grid_of(q_len, k_len, unit)
    rows, keys, _ = tokens(grid)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.rand(3, k_len, generator=generator, device="cpu").to(DEVICE) < 0.02
        for head in range(3):
            columns = chosen[head].expand(q_len, -1)
            assert torch.equal(grid.from_tokens(chosen)[head] & grid.visible, brute(grid, columns))
            diagonals = chosen[head][(rows - keys).clamp(min=0)]
            assert torch.equal(grid.from_diagonals(chosen)[head] & grid.visible, brute(grid, diagonals))
        for block in (64, 128, 256):
            blocks = torch.rand(2, grid.k_blocks(block), generator=generator, device="cpu").to(DEVICE) < 0.4
            columns = blocks[1][keys // block].expand(q_len, -1)
            assert torch.equal(grid.from_blocks(blocks, block)[1] & grid.visible, brute(grid, columns))


@CHUNKS
@pytest.mark.parametrize("block", [64, 128, 256])
def test_from_rule(q_len: int, k_len: int, unit: int, block: int) -> None:
    """Rows see what their own block of the rule sees, and their neighbours' in the block of the grid."""
    grid = grid_of(q_len, k_len, unit)
    rows, keys, _ = tokens(grid)

    def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query * 7 + key * 3) % 5 == 0

    assert torch.equal(grid.from_rule(block, sees) & grid.visible, brute(grid, sees(rows // block, keys // block)))


@pytest.mark.parametrize("shape", [(0, 4, 16), (5, 4, 16), (4, 4, 24), (4, 4, 256)])
def test_refuses(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"unit|chunk"):
        grid_of(*shape)
