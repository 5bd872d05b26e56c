"""MInference: columns and diagonals, tables of heads, and the search for them."""

from __future__ import annotations

import pytest
import torch

from attention_plugins.prefill.attention import dense_attention, sparse_attention
from attention_plugins.prefill.minference import TABLE, Kind, plan_heads
from attention_plugins.prefill.minference_search import candidates, search
from tests.attention_plugins.prefill.prompts import DIM, NUM_HEADS, attention, make, make_prompt


@pytest.mark.parametrize(("first", "length"), [(0, 700), (333, 700), (690, 700)])
def test_vertical_slash(first: int, length: int) -> None:
    """Units that a chosen column or a chosen diagonal goes through, found one pair at a time."""
    prompt = make_prompt(length)
    chunk = prompt.chunk(first)
    plan = make("minference", vertical=35, slash=52).plan(chunk)
    offset = max(first, length - 64)
    rows, keys = torch.arange(first, length)[:, None], torch.arange(length)
    for head in range(NUM_HEADS):
        last = attention(prompt, offset, length, head)
        columns = last.sum(0)
        columns[:30] = float("inf")
        diagonals = torch.stack([torch.diagonal(last, offset - away).sum() for away in range(length)])
        diagonals[:30] = float("inf")
        chosen = torch.zeros(2, length, dtype=torch.bool)
        chosen[0, columns.topk(35).indices] = True
        chosen[1, diagonals.topk(52).indices] = True
        pairs = (chosen[0][keys] | chosen[1][(rows - keys).clamp(min=0)]) & (keys <= rows)
        wanted = torch.zeros_like(plan.mask[head])
        at = pairs.nonzero()
        wanted[at[:, 0] // 128, at[:, 1] // 16] = True
        assert torch.equal(plan.mask[head], wanted | chunk.grid.always)


def test_diagonal_zero_and_the_forced_ones() -> None:
    chunk = make_prompt(700).chunk()
    plan = make("minference", vertical=30, slash=50).plan(chunk)
    assert (plan.mask >= chunk.grid.band(30, 30)).all()


def test_table() -> None:
    """Each head goes by its own row, of its own layer; kinds are what they say."""
    prompt = make_prompt()
    table = torch.tensor([[0, 40, 60], [1, 70, 200], [2, 3, 0], [1, 1035, 50]])
    chunk = prompt.chunk(100, layer=1, calibration={TABLE: torch.stack([torch.zeros_like(table), table])})
    mask = make("minference").plan(chunk).mask
    assert torch.equal(mask[0], make("minference", vertical=40, slash=60).plan(prompt.chunk(100)).mask[0])
    assert torch.equal(mask[1], chunk.grid.band(70, 200) | chunk.grid.always)
    assert torch.equal(mask[3], chunk.grid.visible)
    assert (mask[2].sum(-1) <= 8 + 9 + 3 * 4).all()
    small = plan_heads(chunk, torch.tensor([0, 0, 0]).expand(NUM_HEADS, 3))
    assert torch.equal(small.mask, make("minference", vertical=30, slash=50).plan(prompt.chunk(100)).mask)


def test_block_sparse_takes_the_best_means() -> None:
    prompt = make_prompt(1024)
    plan = plan_heads(prompt.chunk(), torch.tensor([Kind.BLOCK_SPARSE, 2, 0]).expand(NUM_HEADS, 3))
    keys = prompt.keys.view(2, 16, 64, DIM).mean(2)
    for head in range(NUM_HEADS):
        for block in range(8):
            query = prompt.queries[block * 128 : block * 128 + 128, head].mean(0)
            seen = (block + 1) * 2
            best = (keys[head // 2, :seen] @ query).topk(2).indices.tolist()
            wanted = {0, 1, seen - 2, seen - 1, *best}
            units = plan.mask[head, block].unflatten(0, (16, 4))
            assert torch.equal(units.any(-1), units.all(-1))
            assert set(units.any(-1).nonzero().flatten().tolist()) == wanted


def test_search_finds_what_heads_do() -> None:
    """A head that looks at near tokens gets a window, one that looks at a column a column, within the density."""
    length = 1024
    prompt = make_prompt(length, strength=0.3)
    positions = torch.arange(length)
    angle = positions[:, None] / 40.0
    near = torch.cat([angle.cos(), angle.sin()], -1) * 12
    prompt.queries[:, :2, :2], prompt.keys[0, :, :2] = near[:, None], near
    prompt.keys[0, :, 2] = positions * 0.05
    prompt.queries[:, :2, 2] = 8.0
    prompt.queries[:, 2:, 0], prompt.keys[1, :, 0] = 10.0, 0.0
    prompt.keys[1, 500, 0] = 10.0
    chunk = prompt.chunk()
    choices, density = candidates(length)[::2], 0.6
    table = search(chunk, prompt.values, choices, density)
    assert {tuple(row) for row in table.tolist()} <= set(choices)
    plan = plan_heads(chunk, table)
    assert (plan.density() <= density).all()
    assert (table[2:, 0] != Kind.A_SHAPE).all() and plan.mask[2:, 4:, 500 // 16].all()
    errors = []
    wanted = dense_attention(chunk, prompt.values)[0]
    for found in (plan, plan_heads(chunk, torch.tensor([Kind.A_SHAPE, 30, 200]).expand(NUM_HEADS, 3))):
        errors.append((sparse_attention(chunk, prompt.values, found)[0] - wanted).square().mean((0, 2)))
    assert (errors[0][2:] < errors[1][2:] / 10).all()


def test_search_where_nothing_is_cheap_enough() -> None:
    prompt = make_prompt(512)
    choices = [(int(Kind.A_SHAPE), 30, size) for size in (400, 60, 512)]
    assert search(prompt.chunk(), prompt.values, choices, 0.0).tolist() == [[1, 30, 60]] * NUM_HEADS


def test_candidates_reach_from_little_to_all() -> None:
    chunk = make_prompt(1024).chunk()
    choices = candidates(1024)
    for kind in Kind:
        own = [choice for choice in choices if choice[0] == kind]
        ends = [plan_heads(chunk, torch.tensor(choice).expand(NUM_HEADS, 3)).density() for choice in (own[0], own[-1])]
        # The fewest columns and diagonals of a prompt without structure touch nearly all units.
        assert (kind == Kind.VERTICAL_SLASH or (ends[0] < 0.6).all()) and (ends[1] == 1).all()
