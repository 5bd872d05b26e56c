"""`longreach calibrate`, against transformers' attention matrices and eigenvectors by hand."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from server import layer_choice
from server.calibrate import Calibration, calibrate, measure, write
from server.calibration import CacheShape, read_calibration
from server.cli import main
from server.errors import StartError
from server.layer_choice import QUERIES, LayerChoice, lessismore_lists, tidal_lists
from tests.tiny_model import VOCABULARY, write_tiny_model

LAYERS, HEADS, GROUP, DIM = 3, 2, 2, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def asked() -> list[list[int]]:
    return prompts(1024, 1100)


@pytest.fixture(scope="module")
def found(model: Any, asked: list[list[int]]) -> Calibration:
    return measure(model, asked, 8)


@torch.inference_mode()
def attention_and_keys(model: Any, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """[layers, heads, queries, n] of the last queries, and [layers, KV heads, n, head_dim], by transformers."""
    model.set_attn_implementation("eager")
    output = model(torch.tensor([prompt]), output_attentions=True, use_cache=True)
    model.set_attn_implementation("sdpa")
    keys = [layer.keys[0] for layer in output.past_key_values.layers]
    return torch.stack([layer[0, :, -QUERIES:] for layer in output.attentions]), torch.stack(keys)


def test_directions_are_eigenvectors_of_the_keys_second_moment(
    model: Any, asked: list[list[int]], found: Calibration
) -> None:
    keys = torch.cat([attention_and_keys(model, prompt)[1] for prompt in asked], dim=2).double()
    basis = found.tensors["loki.basis"]
    assert (basis.shape, basis.dtype) == ((LAYERS, HEADS, DIM, 8), torch.float32)
    shares = []
    for layer in range(LAYERS):
        for head in range(HEADS):
            mine = keys[layer, head]
            moment, directions = mine.T @ mine, basis[layer, head].double()
            torch.testing.assert_close(directions.T @ directions, torch.eye(8).double(), atol=1e-5, rtol=0)
            values = torch.linalg.eigvalsh(moment).flip(0)
            seen = ((mine @ directions) ** 2).sum(0)
            torch.testing.assert_close(seen, values[:8], rtol=1e-4, atol=0)
            shares.append(float(seen.sum() / (mine**2).sum()))
            largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
            assert (largest > 0).all()
    assert found.held["loki.basis"] == pytest.approx(sum(shares) / len(shares), rel=1e-4)


def by_hand(model: Any, prompt: list[int], selecting: int, reading: int) -> dict[str, float]:
    """Share of one layer's far attention that the lists of another hold, token by token; the mean over KV heads."""
    attention, n = attention_and_keys(model, prompt)[0], len(prompt)
    tokens = n // 16
    held = {name: [0.0] * HEADS for name in ("tidal", "lessismore", "all")}
    for row in range(QUERIES):
        newest = n - QUERIES + row
        strongest = attention[selecting, :, row].unflatten(0, (HEADS, GROUP)).amax(1)
        orders = [sorted(range(newest + 1), key=lambda j, s=s: -float(s[j])) for s in strongest]  # type: ignore[misc]
        last = tokens - (tokens - tokens // 4) - 4
        near = [*range(4), *range(newest - last + 1, newest + 1)]
        others = [[place for place in order if place not in near] for order in orders]
        union: list[int] = []
        for rank in range(tokens):
            union += [order[rank] for order in others if order[rank] not in union]
        shared = near + union[: tokens - tokens // 4]
        assert len(shared) == tokens
        together = strongest.sum(0)
        added = [newest, *sorted(range(newest), key=lambda j, s=together: -float(s[j]))][:tokens]  # type: ignore[misc]
        for head in range(HEADS * GROUP):
            given = attention[reading, head, row]
            far = range(16, newest - 128 + 1)
            for name, places in {"tidal": added, "lessismore": shared, "all": list(far)}.items():
                held[name][head // GROUP] += float(given[[place for place in places if place in far]].sum())
    every = held.pop("all")
    return {name: sum(found / of for found, of in zip(held[name], every, strict=True)) / HEADS for name in held}


@pytest.mark.parametrize("reading", [1, 2])
def test_lists_hold_what_they_hold(model: Any, reading: int) -> None:
    """Those of the first layer, whose attention is equal to the last bit; later ones differ in near ties."""
    (prompt,) = prompts(1024)
    choice = seen(model, prompt)
    for name, share in by_hand(model, prompt, 0, reading).items():
        assert float(choice.mass[name][0, reading]) == pytest.approx(share, abs=1e-5)
        assert (choice.mass[name].tril() == 0).all()


def seen(model: Any, *asked: list[int]) -> LayerChoice:
    from server.watching import run

    choice = LayerChoice(LAYERS)
    for prompt in asked:
        choice.begin()
        run(model, prompt, lambda layer, queries, keys, _, scale: choice.see(layer, queries, keys, scale))
    return choice


def test_texts_count_alike(model: Any, asked: list[list[int]]) -> None:
    both, each = seen(model, *asked), [seen(model, prompt) for prompt in asked]
    for name in layer_choice.SELECTORS:
        torch.testing.assert_close(both.mass[name], each[0].mass[name] + each[1].mass[name])
        assert both.best(name)[1] == pytest.approx(sum(one.best(name)[1] for one in each) / 2)


@pytest.mark.parametrize("lists", [tidal_lists, lessismore_lists])
def test_lists_are_distinct_tokens_that_the_query_sees(lists: Any) -> None:
    torch.manual_seed(3)
    n = 1027
    strongest = torch.rand(HEADS, QUERIES, n).tril(n - QUERIES)
    chosen = lists(strongest)
    assert chosen.shape == (1, QUERIES, n // 16)
    for head in chosen:
        for row, places in enumerate(head.tolist()):
            newest = n - QUERIES + row
            assert len(set(places)) == len(places) and newest in places and 0 <= min(places) <= max(places) <= newest


def test_the_correction_layer_is_the_one_whose_lists_hold_most() -> None:
    choice = LayerChoice(7)
    choice.texts = 2
    mass = choice.mass["tidal"]
    mass[2, 3:] = 2 * torch.tensor([0.9, 0.9, 0.1, 0.1])
    mass[3, 4:] = 2 * torch.tensor([0.5, 0.5, 0.5])
    mass[4, 5:] = 2 * torch.tensor([0.6, 0.6])
    mass[5, 6:] = 2 * torch.tensor([0.7])
    # 3: 1.5; 4: 0.9 + 1.2; 5: 1.8 + 0.7; 6: 0.9 + 0.9 + 0.1.
    layers, held = choice.best("tidal")
    assert layers == [2, 5] and held == pytest.approx(2.5 / 3)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_more_selecting_layers_are_those_that_hold_most_together(count: int) -> None:
    torch.manual_seed(count)
    choice = LayerChoice(9)
    choice.texts = 1
    mass = choice.mass["lessismore"]
    mass.copy_(torch.rand(9, 9).triu(1))

    def held(way: tuple[int, ...]) -> float:
        return sum(float(mass[one, one + 1 : other].sum()) for one, other in itertools.pairwise([*way, 9]))

    most = max(held((2, *others)) for others in itertools.combinations(range(3, 9), count - 1))
    layers, share = choice.best("lessismore", count)
    assert layers[0] == 2 and len(layers) == count and held(tuple(layers)) == pytest.approx(most)
    assert share == pytest.approx(most / max(7 - count, 1))


@pytest.mark.parametrize("count", [0, 8])
def test_no_more_selecting_layers_than_there_are(count: int) -> None:
    with pytest.raises(ValueError, match="1 to 7"):
        LayerChoice(9).best("tidal", count)


@pytest.mark.parametrize(("layers", "chosen"), [(2, [0, 1]), (3, [1, 2]), (4, [2, 3])])
def test_small_models_have_two_selecting_layers_too(layers: int, chosen: list[int]) -> None:
    assert LayerChoice(layers).best("tidal")[0] == chosen


def test_the_file_says_what_it_is_of_and_is_read_by_servers(found: Calibration, tmp_path: Path) -> None:
    file = tmp_path / "c.safetensors"
    write(file, found, "me/tiny")
    read = read_calibration(file, CacheShape(LAYERS, HEADS, DIM))
    assert read.keys() == found.tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in found.tensors.items())
    with safe_open(file, "pt") as content:
        note = content.metadata()
    expected = {"model": "me/tiny", "num_layers": "3", "num_kv_heads": "2", "head_dim": "32", "rank": "8", "texts": "2"}
    assert note.items() >= {**expected, "tokens": "1024 1100"}.items() and note["date"].startswith("20")


@pytest.mark.parametrize(
    ("lengths", "rank", "problem"),
    [
        ((1024, 1023), 8, "prompt 2 has 1023 tokens; at least 1024 are needed"),
        ((1024,), 0, "--rank: 0 directions; allowed are 1 to 32"),
        ((1024,), 33, "--rank: 33 directions; allowed are 1 to 32"),
        ((), 8, "at least one text"),
    ],
)
def test_what_can_not_be_measured_is_refused_before_it_starts(
    model: Any, lengths: tuple[int, ...], rank: int, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.watching.run", lambda *_: pytest.fail("ran"))
    with pytest.raises(StartError, match=problem):
        measure(model, prompts(*lengths), rank)


@pytest.mark.parametrize(
    ("output", "problem"), [("c.pt", "must end in .safetensors"), ("no/c.safetensors", "there is no folder")]
)
def test_where_nothing_can_be_written_nothing_is_loaded(
    output: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.calibrate.load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(StartError, match=f"--output .*{problem}"):
        calibrate("m", ["text"], str(tmp_path / output), 8)


def test_the_command(
    model: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "c.safetensors"
    text.write_text("words")
    monkeypatch.setattr("server.calibrate.load", lambda path: (path, model))
    monkeypatch.setattr("server.calibrate.tokens", lambda _, text: prompts(1030)[0] if text == "words" else [])
    main(["calibrate", str(text), "--output", str(file), "--model", str(folder), "--rank", "4", "--progress"])
    captured = capsys.readouterr()
    assert (
        "loki.basis: 4 directions in each of 3 x 2 heads hold" in captured.out and "tidal.layers: 1, 2;" in captured.out
    )
    assert "3/3" in captured.err and "prompt 1 of 1, 1,030 tokens" in captured.err
    assert read_calibration(file, CacheShape(LAYERS, HEADS, DIM))["loki.basis"].shape[-1] == 4


def test_a_text_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["calibrate", str(tmp_path / "no.txt"), "--output", str(tmp_path / "c.safetensors")])
    assert caught.value.code == 2 and "No such file" in capsys.readouterr().err
