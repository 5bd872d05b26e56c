"""AnchorAttention: the anchors in loops, and its two phases."""

from __future__ import annotations

import pytest
import torch

from attention_plugins.prefill.anchor import Anchor
from attention_plugins.prefill.attention import merge, sparse_attention
from attention_plugins.prefill.base import Plan
from attention_plugins.prefill.reach import groups, near_units
from tests.attention_plugins.prefill.prompts import DIM, NUM_HEADS, make, make_prompt


@pytest.mark.parametrize(("first", "length"), [(0, 700), (256, 700), (512, 520), (200, 690)])
def test_formula(first: int, length: int) -> None:
    prompt, theta, span = make_prompt(length), 4.9, 256
    chunk = prompt.chunk(first)
    plan = make("anchor", theta=theta, step=2).plan(chunk)
    starts = list(range(first, length, 128))
    for head in range(NUM_HEADS):
        keys = prompt.keys[head // 2]
        reached: dict[int, set[int]] = {}
        for start in starts:
            rows = range(start, min(start + 128, length))
            near = start // span * span
            anchors = []
            for row in rows:
                places = sorted({*range(min(128, row + 1)), *range(near, row + 1)})
                anchors.append((keys[places] @ prompt.queries[row, head] * DIM**-0.5).max())
            mean = prompt.queries[list(rows), head].mean(0)
            hot = (keys @ mean * DIM**-0.5 + theta >= torch.stack(anchors).mean()).nonzero().flatten()
            reached.setdefault(near, set()).update(int(key) // 16 for key in hot)
        for block, start in enumerate(starts):
            near, last = start // span * span, min(start + 128, length) - 1
            units = reached[near] | set(range(8)) | set(range(near // 16, last // 16 + 1))
            wanted = {unit for unit in units if unit * 16 <= last}
            assert set(plan.mask[head, block].nonzero().flatten().tolist()) == wanted


def test_phases_merge_to_one_pass() -> None:
    """The sink and near tokens first, the keys within reach afterwards: what a kernel that resumes would do."""
    prompt = make_prompt()
    chunk, pattern = prompt.chunk(), make("anchor")
    assert isinstance(pattern, Anchor)
    plan = pattern.plan(chunk)
    near = Plan.forced(near_units(chunk.grid, pattern.span), chunk.grid, NUM_HEADS)
    stripes = Plan(plan.mask & ~near.mask, chunk.grid)
    assert stripes.mask.sum() > 0 and (near.mask <= plan.mask).all()
    out, lse = merge([sparse_attention(chunk, prompt.values, part) for part in (near, stripes)])
    wanted, wanted_lse = sparse_attention(chunk, prompt.values, plan)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, wanted_lse)


def test_nothing_within_reach() -> None:
    chunk = make_prompt().chunk()
    pattern = make("anchor", theta=float("-inf"))
    assert isinstance(pattern, Anchor)
    assert torch.equal(
        pattern.plan(chunk).mask, Plan.forced(near_units(chunk.grid, pattern.span), chunk.grid, NUM_HEADS).mask
    )


def test_chunks_of_whole_groups_change_nothing() -> None:
    prompt, pattern = make_prompt(), make("anchor")
    whole = pattern.plan(prompt.chunk()).mask
    for chunk, _ in prompt.chunks([0, 256, 768]):
        mask, first = pattern.plan(chunk).mask, chunk.offset // 128
        assert torch.equal(mask, whole[:, first : first + mask.shape[1], : mask.shape[2]])
    assert groups(prompt.chunk(384).grid, 256) == [(0, 1), (1, 3), (3, 5), (5, 6)]
