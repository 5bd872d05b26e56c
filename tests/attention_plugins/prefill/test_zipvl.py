"""ZipVL's token selection."""

from __future__ import annotations

import pytest
import torch

from attention_plugins.prefill.zipvl import important, probes
from tests.attention_plugins.prefill.prompts import DIM, NUM_HEADS, make, make_prompt


@pytest.mark.parametrize(("tau", "count"), [(0.7, 2), (0.85, 3), (0.9, 4), (0.975, 5), (1.0, 5)])
def test_golden_counts(tau: float, count: int) -> None:
    mass = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    assert important(mass, mass, tau).tolist() == [place < count for place in range(5)]
    assert important(mass * 7, mass.flip(0), tau).tolist() == [place < count for place in range(5)][::-1]


@pytest.mark.parametrize("first", [0, 907, 908, 971, 1034])
def test_probes(first: int) -> None:
    """The last 64, and 64 others, each from its own part of the rest; all rows of a short chunk."""
    chunk = make_prompt().chunk(first)
    rows = probes(chunk).tolist()
    assert rows == sorted(set(rows)) and len(rows) == min(128, chunk.q_len)
    assert rows[-64:] == list(range(max(0, chunk.q_len - 64), chunk.q_len))[-len(rows) :]


@pytest.mark.parametrize("first", [0, 600])
def test_formula(first: int) -> None:
    prompt = make_prompt()
    chunk = prompt.chunk(first)
    plan = make("zipvl", tau=0.1, window=40).plan(chunk)
    mass, seen_by = torch.zeros(len(prompt)), torch.zeros(len(prompt))
    for row in probes(chunk).tolist():
        position = first + row
        seen_by[: position + 1] += 1
        for head in range(NUM_HEADS):
            logits = prompt.keys[head // 2, : position + 1] @ chunk.queries[row, head] * DIM**-0.5
            mass[: position + 1] += logits.softmax(0)
    count, total = 0, 0.0
    for share in mass.sort(descending=True).values.tolist():
        count, total = count + 1, total + share
        if total >= 0.1 * mass.sum():
            break
    tokens = torch.zeros(len(prompt), dtype=torch.bool)
    tokens[(mass / seen_by).topk(count).indices] = True
    wanted = (chunk.grid.from_tokens(tokens) | chunk.grid.band(128, 40)) & chunk.grid.visible
    assert torch.equal(plan.mask[0], wanted) and torch.equal(plan.mask[1], wanted)
