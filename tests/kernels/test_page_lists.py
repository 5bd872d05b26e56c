"""Page lists by a kernel, against the naive twin."""

from __future__ import annotations

import pytest
import torch

from attention_plugins import naive
from attention_plugins.prefill.base import Plan
from attention_plugins.prefill.grid import Grid

pytest.importorskip("triton")

from attention_plugins import kernels

HEADS, GROUP = 3, 2


def make_plan(q_len: int, k_len: int, heads: int, device: torch.device, unit: int = 16, share: float = 0.3) -> Plan:
    grid = Grid(q_len, k_len, unit, device)
    generator = torch.Generator().manual_seed(k_len)
    mask = torch.rand(heads, grid.q_blocks, grid.k_units, generator=generator).to(device) < share
    return Plan.forced(mask, grid, heads)


def pages_of(plan: Plan) -> torch.Tensor:
    units = plan.grid.k_units + 3
    return torch.randperm(HEADS * units, generator=torch.Generator().manual_seed(0)).view(HEADS, units).to(
        plan.mask.device
    )  # fmt: skip


def lines(lists: tuple[torch.Tensor, torch.Tensor], unit: int) -> list[list[int]]:
    """Each sequence's pages and, at its end, its tokens."""
    tables, lengths = (tensor.tolist() for tensor in lists)
    return [[*row[: -(-length // unit)], length] for row, length in zip(tables, lengths, strict=True)]


@pytest.mark.parametrize("heads", [HEADS, HEADS * GROUP])
@pytest.mark.parametrize(
    ("q_len", "k_len", "unit"),
    [(1, 1, 16), (128, 128, 16), (129, 700, 16), (300, 301, 8), (256, 8192, 1), (200, 33000, 16), (517, 1035, 128)],
)
def test_lists(heads: int, q_len: int, k_len: int, unit: int, device: torch.device) -> None:
    plan = make_plan(q_len, k_len, heads, device, unit)
    table = pages_of(plan)
    expected = lines(naive.page_lists(plan, table), unit)
    assert lines(kernels.page_lists(plan, table), unit) == expected
    group = heads // HEADS
    for head in range(heads):
        for block, last in enumerate(plan.grid.last_rows.tolist()):
            *pages, length = expected[head * plan.grid.q_blocks + block]
            assert pages == table[head // group, plan.mask[head, block].nonzero().flatten()].tolist()
            assert length == sum(min(unit, last + 1 - u * unit) for u in plan.mask[head, block].nonzero().flatten())


def test_some_heads_into_a_given_place(device: torch.device) -> None:
    plan = make_plan(300, 900, HEADS * GROUP, device)
    table, blocks = pages_of(plan), plan.grid.q_blocks
    whole = lines(naive.page_lists(plan, table), 16)
    for ops in (naive, kernels):
        tables = torch.full((3 * blocks, plan.grid.k_units + 5), -1, dtype=torch.int32, device=device)
        lengths = torch.full((3 * blocks,), -1, dtype=torch.int32, device=device)
        rows = tables[: 2 * blocks, 2:], lengths[: 2 * blocks]
        assert ops.page_lists(plan, table, (3, 5), rows)[0] is rows[0]
        assert lines(rows, 16) == whole[3 * blocks : 5 * blocks]
        assert (tables[2 * blocks :] == -1).all() and (tables[:, :2] == -1).all()
        assert (lengths[2 * blocks :] == -1).all()


def test_heads_that_are_one_in_memory(device: torch.device) -> None:
    grid = Grid(300, 900, 16, device)
    plan = Plan.forced(grid.band(20, 100), grid, HEADS)
    assert plan.mask.stride(0) == 0
    table = pages_of(plan)
    assert lines(kernels.page_lists(plan, table), 16) == lines(naive.page_lists(plan, table), 16)


def test_units_that_lie_apart_in_memory(device: torch.device) -> None:
    plan = make_plan(300, 900, HEADS, device)
    apart = Plan(plan.mask.transpose(1, 2).contiguous().transpose(1, 2), plan.grid)
    table = pages_of(plan)
    assert lines(kernels.page_lists(apart, table), 16) == lines(naive.page_lists(plan, table), 16)
