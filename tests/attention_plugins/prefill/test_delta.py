"""Delta Attention: rows, groups, and what is carried over the border of chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention_plugins.prefill.attention import attend, dense_attention, dense_rows, run, sparse_attention
from attention_plugins.prefill.base import Chunk, Reader
from attention_plugins.prefill.delta import Delta
from tests.attention_plugins.prefill.prompts import Prompt, make, make_prompt
from tests.device import DEVICE

BASE = {"pattern": "streaming", "sinks": 20, "window": 100}


def make_delta(gamma: int = 64) -> Delta:
    pattern = make("delta", base=BASE, gamma=gamma)
    assert isinstance(pattern, Delta)
    return pattern


def test_golden() -> None:
    """8 random queries, 4 channels, sink 1, the row itself and the one before, gamma 4: mean errors .2833 -> .1574."""
    random = np.random.default_rng(0)
    queries, keys, values = (torch.from_numpy(random.standard_normal((8, 4))).float().to(DEVICE) for _ in range(3))
    chunk = Chunk(queries[:, None], keys[None], scale=0.5, prompt_len=10_000)
    rows, columns = torch.arange(8)[:, None], torch.arange(8)
    seen = (columns <= rows) & ((columns < 1) | (rows - columns < 2))
    sparse, _ = attend(queries[:, None], keys[None], values[None], seen, 0.5)
    dense, _ = dense_attention(chunk, values[None])
    pattern = make_delta(4)
    out, carry = pattern.correct(chunk, values[None], pattern.plan(chunk), sparse, None, dense_rows)
    assert (sparse - dense).abs().mean().item() == pytest.approx(0.2833, abs=5e-5)
    assert (out - dense).abs().mean().item() == pytest.approx(0.1574, abs=5e-5)
    assert carry is None


@pytest.mark.parametrize("gamma", [1, 7, 64, 100, 200])
@pytest.mark.parametrize("first", [0, 128, 333])
def test_formula(gamma: int, first: int) -> None:
    """Rows that are multiples of gamma, and the last, are dense; the others move with theirs."""
    prompt = make_prompt()
    chunk, pattern = prompt.chunk(first), make_delta(gamma)
    dense, _ = dense_attention(chunk, prompt.values)
    base, _ = sparse_attention(chunk, prompt.values, pattern.base.plan(chunk))
    plan = pattern.plan(chunk)
    measured_rows: list[tuple[torch.Tensor, torch.Tensor]] = []

    def recorded(chunk: Chunk, values: torch.Tensor | Reader, rows: torch.Tensor) -> torch.Tensor:
        measured_rows.append((rows, dense_rows(chunk, values, rows)))
        return measured_rows[-1][1]

    sparse, _ = sparse_attention(chunk, prompt.values, plan)
    out, _ = pattern.correct(chunk, prompt.values, plan, sparse, None, recorded)
    dense_from = pattern.dense_from(chunk)
    assert len(prompt) - first - dense_from >= len(prompt) % gamma + max(128, gamma) or dense_from == 0
    torch.testing.assert_close(out[dense_from:], dense[dense_from:], atol=1e-5, rtol=1e-5)
    for row in range(dense_from):
        measured = max(0, (first + row) // gamma * gamma - first)
        wanted = dense[row] if row == measured else base[row] + dense[measured] - base[measured]
        torch.testing.assert_close(out[row], wanted, atol=1e-5, rtol=1e-5)
    ((rows, measured_dense),) = measured_rows
    assert torch.equal(out[rows], measured_dense), "not only nearly"
    assert set(rows.tolist()) - {0} == set(range(-first % gamma, dense_from, gamma)) - {0}


def test_last_rows_of_the_base_are_dense_as_well() -> None:
    prompt = make_prompt()
    pattern = make("delta", base={**BASE, "dense_last": 500}, gamma=64)
    out, _ = run(pattern, prompt.chunk(), prompt.values)
    dense, _ = dense_attention(prompt.chunk(), prompt.values)
    torch.testing.assert_close(out[-500:], dense[-500:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out[:-640], dense[:-640], atol=1e-3)


@pytest.mark.parametrize("gamma", [64, 100, 300])
@pytest.mark.parametrize("cuts", [[0, 128], [0, 128, 256, 384, 512, 640, 768, 896, 1024], [0, 512, 640]])
def test_chunks_carry_the_open_group(gamma: int, cuts: list[int]) -> None:
    prompt, pattern = make_prompt(), make_delta(gamma)
    whole, _ = run(pattern, prompt.chunk(), prompt.values)
    carry, parts = None, []
    for chunk, values in prompt.chunks(cuts):
        out, carry = run(pattern, chunk, values, carry)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)
    assert carry is None


def test_uneven_chunks_keep_measured_rows_dense() -> None:
    """Other blocks, so another plan; rows are measured where they were, and single tokens pass the difference on."""
    prompt, pattern = make_prompt(), make_delta(64)
    dense, _ = dense_attention(prompt.chunk(), prompt.values)
    carry, parts, carried = None, [], []
    for chunk, values in prompt.chunks([0, 100, 101, 102, 191, 192, 500]):
        out, carry = run(pattern, chunk, values, carry)
        parts.append(out)
        carried.append(carry)
    out = torch.cat(parts)
    torch.testing.assert_close(out[::64], dense[::64], atol=1e-5, rtol=1e-5)
    passed = [difference for difference in carried[:3] if difference is not None]
    assert len(passed) == 3 and torch.equal(passed[0], passed[1]) and torch.equal(passed[1], passed[2])
    assert carried[4] is None and carried[-1] is None


def test_comes_nearer_to_dense() -> None:
    """Where rows lose alike, which is what the method is for: a column that all want and the base leaves out."""
    prompt = make_prompt(strength=0.5)
    prompt.queries[..., 0], prompt.keys[:, 300, 0] = 8.0, 8.0
    chunk = prompt.chunk()
    dense, _ = dense_attention(chunk, prompt.values)
    pattern = make_delta(64)
    base, _ = run(pattern.base, chunk, prompt.values)
    out, _ = run(pattern, chunk, prompt.values)
    rows = slice(448, 768)
    assert (out[rows] - dense[rows]).abs().mean() < 0.3 * (base[rows] - dense[rows]).abs().mean()


def test_unchanged_where_nothing_is_left_out() -> None:
    prompt = make_prompt(300)
    pattern = make("delta", base=BASE | {"window": 300})
    out, _ = run(pattern, prompt.chunk(prompt_len=5000), prompt.values)
    torch.testing.assert_close(out, dense_attention(prompt.chunk(), prompt.values)[0], atol=1e-5, rtol=1e-5)


def test_unknown_end_makes_each_chunks_last_rows_dense() -> None:
    prompt, pattern = make_prompt(), make_delta(64)
    known, unknown = (pattern.plan(prompt.chunk(0, 640, prompt_len=length)) for length in (len(prompt), None))
    assert (known.mask <= unknown.mask).all() and unknown.mask[:, -1].all() and not known.mask[:, -1].all()


def test_half_precision_out() -> None:
    prompt = make_prompt(600)
    half = Prompt(*(tensor.bfloat16() for tensor in (prompt.queries, prompt.keys, prompt.values)))
    pattern = make_delta(64)
    chunk = half.chunk()
    base, _ = sparse_attention(chunk, half.values, pattern.plan(chunk))
    out, _ = pattern.correct(chunk, half.values, pattern.plan(chunk), base.bfloat16(), None, dense_rows)
    assert out.dtype == torch.float32 and out.isfinite().all()
