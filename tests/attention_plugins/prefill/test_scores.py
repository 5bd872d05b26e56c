"""What patterns look at, in loops."""

from __future__ import annotations

import pytest
import torch

from attention_plugins.prefill import base
from attention_plugins.prefill.scores import column_sums, diagonal_sums, last_row_sums, pooled_keys, pooled_queries
from tests.attention_plugins.prefill.prompts import NUM_HEADS, attention, make_prompt
from tests.device import DEVICE


@pytest.mark.parametrize("tile", [64, 100, 512])
@pytest.mark.parametrize(("first", "count"), [(0, 128), (300, 64), (333, 3), (339, 128)])
def test_last_rows(first: int, count: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base.Chunk.tiles, "__defaults__", (tile,))
    prompt = make_prompt(340)
    columns, diagonals = last_row_sums(prompt.chunk(first), count)
    rows = min(count, 340 - first)
    assert columns.shape == diagonals.shape == (NUM_HEADS, 340)
    for head in range(NUM_HEADS):
        last = attention(prompt, 340 - rows, 340, head)
        torch.testing.assert_close(columns[head], last.sum(0))
        wanted = torch.stack([torch.diagonal(last, 340 - rows - away).sum() for away in range(340)])
        torch.testing.assert_close(diagonals[head], wanted)


def test_column_sums_of_some_rows() -> None:
    prompt = make_prompt(200)
    sums = column_sums(prompt.chunk(50), torch.tensor([0, 7, 149]))
    for head in range(NUM_HEADS):
        torch.testing.assert_close(sums[head], attention(prompt, 0, 200, head)[[50, 57, 199]].sum(0))


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 5), (5, 1), (4, 7), (7, 4)])
def test_diagonals(m: int, n: int) -> None:
    tile = torch.randn(2, m, n, generator=torch.Generator().manual_seed(0), device="cpu").to(DEVICE)
    wanted = [torch.diagonal(tile, n - 1 - away, 1, 2).sum(-1) for away in range(m + n - 1)]
    torch.testing.assert_close(diagonal_sums(tile), torch.stack(wanted, -1))


@pytest.mark.parametrize("first", [0, 100, 339])
def test_pools(first: int) -> None:
    prompt = make_prompt(340)
    chunk = prompt.chunk(first)
    queries = [rows.mean(0) for rows in chunk.queries.split(128)]
    torch.testing.assert_close(pooled_queries(chunk), torch.stack(queries))
    for block in (64, 128):
        keys = [keys.mean(1) for keys in prompt.keys.split(block, 1)]
        torch.testing.assert_close(pooled_keys(chunk, block), torch.stack(keys, 1))
