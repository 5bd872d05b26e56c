"""FlexPrefill: the dossier's distances, and the formulas in loops."""

from __future__ import annotations

import math

import pytest
import torch

from attention_plugins.prefill.drawing import along
from attention_plugins.prefill.flexprefill import distance
from attention_plugins.prefill.scores import block_sums
from tests.attention_plugins.prefill.prompts import DIM, NUM_HEADS, make, make_prompt


@pytest.mark.parametrize(
    ("p", "q", "wanted"),
    [
        ([0.5, 0.5], [0.9, 0.1], 0.3190),
        ([0.25] * 4, [0.4, 0.3, 0.2, 0.1], 0.1669),
        ([0.25] * 4, [0.3, 0.25, 0.25, 0.2], 0.0503),
        ([1.0, 0.0], [0.0, 1.0], math.log(2) ** 0.5),
        ([0.3, 0.7], [0.3, 0.7], 0.0),
    ],
)
def test_distances(p: list[float], q: list[float], wanted: float) -> None:
    """Shares of 0 have a distance as well; the paper's code finds NaN there."""
    assert distance(torch.tensor(p), torch.tensor(q)).item() == pytest.approx(wanted, abs=5e-5)


@pytest.mark.parametrize(("first", "length"), [(0, 640), (256, 640), (100, 601), (513, 640)])
def test_diagonals_of_blocks(first: int, length: int) -> None:
    """Diagonal j of a block of queries: its tokens, j * 128 earlier."""
    chunk = make_prompt(length).chunk(first)
    blocks = chunk.grid.k_blocks(128)
    for diagonal in range(blocks):
        chosen = torch.zeros(1, blocks, dtype=torch.bool)
        chosen[:, diagonal] = True
        mask = along(chunk, chosen)[0]
        for block, start in enumerate(range(first, length, 128)):
            units = {key // 16 for key in range(start - diagonal * 128, start - diagonal * 128 + 128) if key >= 0}
            assert set(mask[block].nonzero().flatten().tolist()) == {unit for unit in units if unit * 16 < length}


def brute(prompt_length: int, gamma: float, tau: float, floor: int) -> torch.Tensor:
    """The formulas for a whole prompt of whole blocks, head by head: bool [heads, blocks, blocks]."""
    prompt = make_prompt(prompt_length, strength=4.0)
    blocks = prompt_length // 128
    found = torch.zeros(NUM_HEADS, blocks, blocks, dtype=torch.bool)
    for head in range(NUM_HEADS):
        keys, queries = prompt.keys[head // 2], prompt.queries[:, head]
        causal = torch.arange(prompt_length) <= torch.arange(prompt_length - 128, prompt_length)[:, None]
        last = (queries[-128:] @ keys.T * DIM**-0.5).masked_fill(~causal, float("-inf")).softmax(-1)
        columns = last.mean(0)
        diagonals = torch.stack([torch.diagonal(last, prompt_length - 128 - o).sum() / 128 for o in range(len(keys))])
        means = keys.view(blocks, 128, DIM).mean(1)
        guess = (queries[-128:].mean(0) @ means.T * DIM**-0.5).softmax(0)
        by_means = distance(guess, block_sums(columns, 128)) < tau
        for block in range(blocks):
            found[head, block, [0, block]] = True
        for scores, slash in ((columns, False), (diagonals, True)):
            count = sum(total <= gamma for total in scores.sort(descending=True).values.cumsum(0).tolist()) + 1
            wanted = floor if by_means else max(floor, min(count, prompt_length) // 128 + 1)
            for chosen in block_sums(scores, 128).topk(min(wanted, blocks)).indices.tolist():
                for block in range(blocks):
                    if slash and block >= chosen:
                        found[head, block, block - chosen] = True
                    if not slash and block >= chosen:
                        found[head, block, chosen] = True
        for block in range(blocks if by_means else 0):
            mean = queries[block * 128 : block * 128 + 128].mean(0)
            shares = (mean @ means[: block + 1].T * DIM**-0.5).softmax(0)
            total = 0.0
            for chosen in shares.argsort(descending=True).tolist():
                if total < gamma:
                    found[head, block, chosen] = True
                total += float(shares[chosen])
    return found


@pytest.mark.parametrize(("gamma", "tau", "floor"), [(0.3, 0.0, 1), (0.6, 0.0, 2), (0.4, 1.0, 1), (0.5, 0.42, 1)])
def test_formulas(gamma: float, tau: float, floor: int) -> None:
    prompt = make_prompt(1280, strength=4.0)
    plan = make("flexprefill", gamma=gamma, tau=tau, min_budget=128 * floor).plan(prompt.chunk())
    wanted = brute(1280, gamma, tau, floor)
    assert torch.equal(plan.mask.unflatten(-1, (10, 8)).all(-1), wanted)
    assert torch.equal(plan.mask.unflatten(-1, (10, 8)).any(-1), wanted)


def test_spread_late_rows_keep_their_share() -> None:
    """Ranked together with early rows, whose few blocks have large shares, late rows would get less than theirs."""
    prompt = make_prompt(1280)
    prompt.queries[:] = 0
    plan = make("flexprefill", gamma=0.5, tau=1.0, min_budget=1).plan(prompt.chunk())
    blocks = plan.mask.unflatten(-1, (10, 8)).any(-1).sum(-1)
    assert (blocks * 2 >= torch.arange(1, 11)).all()
