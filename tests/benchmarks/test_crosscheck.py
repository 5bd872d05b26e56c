"""The cross-check's own arithmetic; kvpress itself runs outside CI."""

from __future__ import annotations

import pytest
import torch

from benchmarks.crosscheck.__main__ import failures, table
from benchmarks.crosscheck.agreement import Agreement
from benchmarks.crosscheck.cases import CASES, NUM_KV_HEADS, NUM_LAYERS, Case, gates
from benchmarks.crosscheck.ours import Ours, Prompt

SNAPKV = next(case for case in CASES if case.words["policy"] == "snapkv")


def prompt(tokens: int = 90) -> Prompt:
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 3, 2, tokens, 8, generator=generator)
    return Prompt(keys, values, torch.randn(3, tokens, 4, 8, generator=generator), torch.ones(tokens + 512, 8))


def agree(ours: Ours, theirs: torch.Tensor) -> Agreement:
    agreement = Agreement()
    agreement.add(ours, theirs)
    return agreement


def test_the_same_choice_agrees() -> None:
    ours = Ours(SNAPKV.words, prompt(), 45)
    counts = ours.counts()
    assert (counts == 45).all()
    kept = ours.kept(counts)
    assert (kept.sum(-1) == counts).all() and kept[..., -32:].all()
    summary = agree(ours, kept).summary()
    assert (summary["identical"], summary["overlap"], summary["score_gap"], summary["same_counts"]) == (1, 1, 0, 1)
    assert summary["tokens_ours"] == summary["tokens_kvpress"] == 45 * 6
    assert failures(SNAPKV, summary) == []
    assert "| snapkv | 100.00% |" in table({"snapkv": summary})


def test_one_exchanged_token_shows() -> None:
    ours = Ours(SNAPKV.words, prompt(), 45)
    theirs = ours.kept(ours.counts())
    scores = ours.scores[1, 0]
    dropped = scores.masked_fill(theirs[1, 0], float("inf")).argmin()
    best = scores.masked_fill(~scores.isfinite(), -1).argmax()
    theirs[1, 0, best], theirs[1, 0, dropped] = False, True
    agreement = agree(ours, theirs)
    assert (agreement.sets, agreement.identical, agreement.tokens, agreement.shared) == (6, 5, 270, 269)
    assert agreement.lowest == pytest.approx(44 / 45)
    assert agreement.gap == pytest.approx(float((scores[best] - scores[dropped]) / scores[best]), rel=1e-4)
    assert [line.partition(":")[0] for line in failures(SNAPKV, agreement.summary())] == [SNAPKV.name] * 3


def test_another_number_of_tokens_shows() -> None:
    ours = Ours(SNAPKV.words, prompt(), 45)
    counts = ours.counts()
    counts[0, 0] -= 3
    agreement = agree(ours, ours.kept(counts))
    assert (agreement.identical, agreement.same_counts, agreement.largest_shift) == (6, 5, 3)
    assert failures(SNAPKV, agreement.summary()) == [f"{SNAPKV.name}: same_counts is 0.83333, not 1.0"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_runs(case: Case) -> None:
    """On a prompt of the model's shape: kept sets have the asked-for sizes."""
    generator = torch.Generator().manual_seed(2)
    keys, values = torch.randn(2, NUM_LAYERS, NUM_KV_HEADS, 400, 8, generator=generator)
    queries = torch.randn(NUM_LAYERS, 400, 3 * NUM_KV_HEADS, 8, generator=generator)
    ours = Ours(case.words, Prompt(keys, values, queries, torch.ones(400 + 512, 8)), int(400 * case.keep))
    counts = ours.counts()
    assert (ours.kept(counts).sum(-1) == counts).all()
    if "gates" not in case.words:
        assert int(counts.sum()) == int(400 * case.keep) * NUM_LAYERS * NUM_KV_HEADS


def test_gates_differ() -> None:
    assert len({gate for layer in gates() for gate in layer}) == NUM_LAYERS * NUM_KV_HEADS
