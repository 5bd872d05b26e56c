"""NAMM's parts against loops, its observer in any chunks, and its weights."""

from __future__ import annotations

import cmath
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import kvcache.namm
import kvcache.observers.spectrogram
from kvcache.evidence import LayerEvidence
from kvcache.model import ModelFacts
from kvcache.namm import SHAPES, Network, age_embedding
from kvcache.observers.spectrogram import Spectrogram, attention_columns, averaged, magnitudes
from kvcache.policies.namm import NAMM
from kvcache.registry import make_policy
from tests.kvcache.brute_force import softmax
from tests.kvcache.synthetic import SCALE, PagedCache, compress, positions_of, random_network, words

PROMPT = 150


def test_512_queries_make_17_frequencies_in_33_frames() -> None:
    assert magnitudes(torch.randn(5, 512)).shape == (5, 17, 33)
    assert magnitudes(torch.randn(5, 150)).shape == (5, 17, 10)
    assert magnitudes(torch.randn(5, 1)).shape == magnitudes(torch.randn(5, 32)).shape == (5, 17, 3)


@pytest.mark.parametrize("samples", [3, 40, 64])
def test_magnitudes_are_those_of_a_fourier_transform(samples: int) -> None:
    torch.manual_seed(0)
    signal = torch.rand(samples)
    full = [0.0] * (32 - samples) + signal.tolist()
    mirrored = full[16:0:-1] + full + full[-2:-18:-1]
    found = magnitudes(signal[None])[0]
    for frame in range(found.shape[1]):
        part = mirrored[16 * frame : 16 * frame + 32]
        tapered = [x * (0.5 - 0.5 * math.cos(2 * math.pi * i / 32)) for i, x in enumerate(part)]
        for frequency in range(17):
            total = sum(x * cmath.exp(-2j * math.pi * frequency * i / 32) for i, x in enumerate(tapered))
            assert float(found[frequency, frame]) == pytest.approx(abs(total), abs=1e-5)


def test_the_average_moves_frame_by_frame() -> None:
    torch.manual_seed(0)
    before, frames = torch.rand(3, 17), torch.rand(3, 17, 6)
    expected = before
    for frame in frames.unbind(-1):
        expected = 0.99 * expected + 0.01 * frame
    torch.testing.assert_close(averaged(before, frames), expected)
    torch.testing.assert_close(averaged(averaged(before, frames[..., :2]), frames[..., 2:]), expected)


def test_columns_are_causal_and_averaged_over_the_group() -> None:
    torch.manual_seed(0)
    queries, keys = torch.randn(4, 2, 8), torch.randn(9, 8)
    columns = attention_columns(queries, keys, 0.3)
    for row in range(4):
        seen = 9 - 4 + row + 1
        heads = [softmax((keys[:seen] @ queries[row, head] * 0.3).tolist()) for head in range(2)]
        expected = [sum(at) / 2 for at in zip(*heads, strict=True)] + [0.0] * (9 - seen)
        torch.testing.assert_close(columns[row], torch.tensor(expected))


def test_the_newest_token_has_age_0() -> None:
    ages = age_embedding(torch.arange(5, -1, -1))
    assert ages.shape == (6, 8) and ages[-1].tolist() == [0.0] * 4 + [1.0] * 4
    speeds = [50_000 ** (-i / 4) for i in range(4)]
    expected = [math.sin(5 * speed) for speed in speeds] + [math.cos(5 * speed) for speed in speeds]
    torch.testing.assert_close(ages[0], torch.tensor(expected))


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_scores_of_the_network(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token, each seeing itself and newer ones."""
    torch.manual_seed(0)
    monkeypatch.setattr(kvcache.namm, "_MAX_LOGITS", 20 * rows)
    network, features = random_network(), torch.rand(20, 17)
    inputs = torch.cat((features, age_embedding(torch.arange(19, -1, -1))), -1)
    query, key, value = (
        inputs @ network.weights[f"attention.{part}.weight"].T + network.weights[f"attention.{part}.bias"]
        for part in ("query", "key", "value")
    )
    expected = []
    for token in range(20):
        weights = (key[token:] @ query[token] / 32**0.5).softmax(-1)
        expected.append(network.weights["score.weight"] @ (weights @ value[token:]) + network.weights["score.bias"])
    torch.testing.assert_close(network.scores(features), torch.cat(expected), rtol=1e-4, atol=1e-4)
    older = features.clone()
    older[:5] += 1.0
    assert torch.equal(network.scores(older)[5:], network.scores(features)[5:]), "older tokens are not seen"


@pytest.fixture
def short_period(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(kvcache.observers.spectrogram, "PERIOD", 64)
    return 64


def features_of(cache: PagedCache, chunks: list[int], layer: int = 0) -> torch.Tensor:
    compressor = cache.compressor()
    cache.start(compressor, words("namm", 70))
    cache.feed(compressor, chunks)
    (spectrogram,) = compressor.observers("r")
    assert isinstance(spectrogram, Spectrogram) and not spectrogram.missing
    return spectrogram.found(layer).cpu()


@pytest.mark.parametrize("chunks", [[PROMPT], [1] * PROMPT, [64, 64, 22], [63, 2, 85], [128, 1, 21]], ids=str)
def test_features_are_carried_from_update_to_update(chunks: list[int], short_period: int) -> None:
    """Two of 64 queries and one of 22, however the prompt comes; a token that isn't there yet has attention 0."""
    cache = PagedCache(PROMPT, num_heads=4, num_kv_heads=2)
    found = features_of(cache, chunks, layer=1)
    for head in range(2):
        expected = torch.zeros(PROMPT, 17)
        for first, end in ((0, 64), (64, 128), (128, 150)):
            queries = cache.queries[1, first:end, 2 * head : 2 * head + 2].cpu()
            columns = attention_columns(queries, cache.keys[1, head, :end].cpu(), SCALE)
            frames = magnitudes(torch.nn.functional.pad(columns, (0, PROMPT - end)).T)
            expected = averaged(expected, frames)
        torch.testing.assert_close(found[head], expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(found, features_of(cache, [PROMPT], layer=1)), "not even rounding differs"


def test_tokens_may_be_taken_a_few_at_a_time(short_period: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PagedCache(PROMPT)
    whole = features_of(cache, [PROMPT])
    monkeypatch.setattr(kvcache.observers.spectrogram, "_MAX_SAMPLES", 7 * 128)
    torch.testing.assert_close(features_of(cache, [PROMPT]), whole)


def test_the_budget_takes_the_highest_scores(short_period: int) -> None:
    cache = PagedCache(PROMPT, num_layers=2)
    run = compress(cache, words("namm", 70), [40, 110])
    for layer in range(2):
        for head, features in enumerate(features_of(PagedCache(PROMPT, num_layers=2), [PROMPT], layer)):
            scores = random_network().scores(features)[: run.plan.full_pages * 16]
            scores[:3] = math.inf
            scores[PROMPT - run.policy.recent :] = math.inf
            best = scores.topk(len(run.kept[layer][head])).indices.sort().values
            assert run.kept[layer][head].tolist() == best.tolist()
    whole = compress(PagedCache(PROMPT, num_layers=2), words("namm", 70))
    assert positions_of(whole.kept) == positions_of(run.kept)


def test_all_of_the_prompt_is_watched() -> None:
    policy = make_policy({"policy": "namm"})
    assert policy is not None and policy.first_query(3000) == 0
    with pytest.raises(RuntimeError, match="need the prompt's keys"):
        policy.observers(1, 3000)[0].record(0, 0, torch.zeros(1, 2, 8))


def test_without_weights_scores_are_an_error() -> None:
    keys = torch.zeros(1, 8, 4)
    evidence = LayerEvidence(0, keys, keys, None, 1.0, {"spectrogram": torch.zeros(1, 8, 17)}, ModelFacts())
    with pytest.raises(ValueError, match="NAMM's weights are needed"):
        NAMM(NAMM.Args.model_validate({})).scores(evidence)


def test_weights_come_from_a_file(tmp_path: Path) -> None:
    network = random_network(3)
    save_file({name: tensor.half() for name, tensor in network.weights.items()}, tmp_path / "w.safetensors")
    loaded = Network.load(tmp_path / "w.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in loaded.weights.values())
    features = torch.rand(9, 17)
    torch.testing.assert_close(loaded.scores(features), network.scores(features), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"score.bias": None}, "doesn't fit in score.bias; it must hold attention.query.weight"),
        ({"score.weight": torch.zeros(1, 31)}, "doesn't fit in score.weight"),
        ({"other": torch.zeros(1)}, "doesn't fit in other"),
    ],
)
def test_files_that_do_not_fit_are_named(change: dict[str, torch.Tensor | None], why: str, tmp_path: Path) -> None:
    tensors = {**{name: torch.zeros(shape) for name, shape in SHAPES.items()}, **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "w")
    with pytest.raises(ValueError, match=why):
        Network.load(tmp_path / "w")


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    (tmp_path / "w").write_text("no weights")
    for name in ("w", "missing"):
        with pytest.raises(ValueError, match=f"{name} can't be read as safetensors"):
            Network.load(tmp_path / name)
