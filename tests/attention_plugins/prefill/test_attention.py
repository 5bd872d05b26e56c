"""The executor's naive twin."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from attention_plugins.prefill.attention import attend, dense_attention, dense_rows, merge, sparse_attention
from attention_plugins.prefill.base import Plan
from tests.attention_plugins.prefill.prompts import DIM, Pages, make, make_prompt
from tests.device import DEVICE


@pytest.mark.parametrize("first", [0, 128, 200, 299])
def test_dense_is_torchs_attention(first: int) -> None:
    prompt = make_prompt(300)
    chunk = prompt.chunk(first)
    out, lse = dense_attention(chunk, prompt.values)
    keys, values = (tensor.repeat_interleave(2, 0) for tensor in (prompt.keys, prompt.values))
    causal = torch.arange(300) <= torch.arange(first, 300)[:, None]
    wanted = F.scaled_dot_product_attention(chunk.queries.transpose(0, 1), keys, values, attn_mask=causal)
    torch.testing.assert_close(out, wanted.transpose(0, 1), atol=1e-5, rtol=1e-5)
    logits = (chunk.queries.transpose(0, 1) @ keys.transpose(1, 2) * DIM**-0.5).masked_fill(~causal, float("-inf"))
    torch.testing.assert_close(lse, logits.logsumexp(-1).T)
    rows = torch.tensor([0, len(out) // 2, len(out) - 1])
    torch.testing.assert_close(dense_rows(chunk, prompt.values, rows), out[rows])


@pytest.mark.parametrize("per_kv_head", [False, True])
def test_sparse_is_attention_over_the_mask(per_kv_head: bool) -> None:
    prompt = make_prompt(300)
    chunk = prompt.chunk(70)
    chance = torch.rand(2 if per_kv_head else 4, 2, 19, generator=torch.Generator().manual_seed(1), device="cpu").to(
        DEVICE
    )
    plan = Plan.forced(chance < 0.3, chunk.grid)
    out, lse = sparse_attention(chunk, Pages(prompt.values), plan)
    for head in range(4):
        mask = plan.mask[head // 2 if per_kv_head else head]
        for row in (0, 5, 127, 128, 229):
            keys = torch.tensor([key for key in range(71 + row) if mask[row // 128, key // 16]])
            logits = prompt.keys[head // 2, keys] @ chunk.queries[row, head] * DIM**-0.5
            torch.testing.assert_close(lse[row, head], logits.logsumexp(0))
            torch.testing.assert_close(out[row, head], logits.softmax(0) @ prompt.values[head // 2, keys])


@pytest.mark.parametrize("name", ["anchor", "flexprefill", "hip"])
def test_parts_merge(name: str) -> None:
    """What a plan computes and what it leaves out merge to dense attention; rows of an empty part count for nothing."""
    prompt = make_prompt(500)
    chunk = prompt.chunk(128)
    plan = make(name).plan(chunk)
    rest = Plan(chunk.grid.visible & ~plan.mask, chunk.grid)
    parts = [sparse_attention(chunk, prompt.values, part) for part in (plan, rest)]
    out, lse = merge(parts)
    wanted, wanted_lse = dense_attention(chunk, prompt.values)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, wanted_lse)


def test_rows_that_see_nothing() -> None:
    prompt = make_prompt(20)
    seen = torch.zeros(20, 20, dtype=torch.bool)
    seen[3, :2] = True
    out, lse = attend(prompt.queries, prompt.keys, prompt.values, seen, 1.0)
    assert (out[4:] == 0).all() and (lse[4:] == float("-inf")).all() and lse[3].isfinite().all()
    merged, merged_lse = merge([(out, lse), (out, lse)])
    torch.testing.assert_close(merged, out)
    assert (merged_lse[4:] == float("-inf")).all()
