"""`longreach calibrate --prefill`: tables that servers read and MInference plans with."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from attention_plugins.prefill.attention import dense_attention, sparse_attention
from attention_plugins.prefill.base import Chunk
from attention_plugins.prefill.minference import TABLE, plan_heads
from server import head_tables
from server.calibration import read_head_tables
from server.cli import main
from server.errors import StartError
from server.head_tables import calibrate_heads, measure, summary
from server.watching import run
from tests.tiny_model import VOCABULARY, write_tiny_model

LAYERS, HEADS = 3, 4
PROMPT = [random.Random(3).randrange(VOCABULARY) for _ in range(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def table(model: Any) -> torch.Tensor:
    return measure(model, PROMPT, 0.6)


def test_every_head_has_a_kind_within_the_density(model: Any, table: torch.Tensor) -> None:
    """And comes nearer to dense attention than half as many tokens of what heads get without a table."""
    assert table.shape == (LAYERS, HEADS, 3) and table.dtype == torch.int64
    seen: list[int] = []

    def see(layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> None:
        chunk = Chunk(queries.transpose(0, 1), keys, scale, layer=layer)
        plan = plan_heads(chunk, table[layer])
        assert (plan.density() <= 0.6 + 1e-6).all()
        wanted = dense_attention(chunk, values)[0]
        usual = plan_heads(chunk, torch.tensor([[0, 30, 50]]).expand(HEADS, 3))
        own, other = (
            (sparse_attention(chunk, values, each)[0] - wanted).square().mean((0, 2)) for each in (plan, usual)
        )
        assert (own <= other + 1e-9).all()
        seen.append(layer)

    run(model, PROMPT, see)
    assert seen == list(range(LAYERS))


def test_the_file_is_read_by_servers(folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(head_tables, "load", lambda path: (None, model))
    monkeypatch.setattr(head_tables, "tokens", lambda tokenizer, text: PROMPT[:600])
    file = tmp_path / "heads.safetensors"
    table = calibrate_heads(str(folder), "a text", str(file), 0.6)
    assert torch.equal(read_head_tables(file, (LAYERS, HEADS))[TABLE], table)
    assert summary(table).startswith(f"{TABLE}: 3 x 4 heads: ")


def test_what_cant_be_measured(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StartError, match="--density: 0"):
        measure(model, PROMPT, 0.0)
    with pytest.raises(StartError, match="prompt 1 has 100 tokens; at least 512"):
        measure(model, PROMPT[:100], 0.1)
    with pytest.raises(StartError, match=r"must end in \.safetensors"):
        calibrate_heads("nowhere", "text", str(tmp_path / "x.json"), 0.1)
    with pytest.raises(SystemExit):
        main(["calibrate", "a.txt", "b.txt", "--prefill", "--output", "x.safetensors"])
    assert "--prefill takes one text" in capsys.readouterr().err
