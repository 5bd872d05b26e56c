"""Head gates from a model's own attention, against transformers' attention matrices."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.errors import StartError
from server.head_gates import Reach, measure
from tests.tiny_model import VOCABULARY, write_tiny_model

REACH = Reach(sinks=5, recent=20, window=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoModelForCausalLM.from_pretrained(write_tiny_model(tmp_path_factory.mktemp("tiny"))).eval()


def prompts(*lengths: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def far_by_hand(model: Any, prompt: list[int]) -> list[list[float]]:
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model(torch.tensor([prompt]), output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    rows = []
    for layer in attentions:
        heads = [
            sum(float(head[query, 5 : len(prompt) - 20].sum()) for query in range(len(prompt) - 8, len(prompt))) / 8
            for head in layer[0]
        ]
        rows.append([max(heads[0:2]), max(heads[2:4])])
    return rows


def test_gates_are_the_attention_in_the_middle_spread_over_0_to_1(model: Any) -> None:
    asked = prompts(60, 97)
    masses = [far_by_hand(model, prompt) for prompt in asked]
    means = [[(a + b) / 2 for a, b in zip(*rows, strict=True)] for rows in zip(*masses, strict=True)]
    low, high = min(map(min, means)), max(map(max, means))
    expected = [[(mean - low) / (high - low) for mean in row] for row in means]
    found = measure(model, asked, REACH)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-4, rtol=0)
    assert {min(map(min, found)), max(map(max, found))} == {0.0, 1.0}
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("length", [1, 25])
def test_prompts_without_a_middle_are_refused(model: Any, length: int) -> None:
    with pytest.raises(StartError, match=f"prompt 2 has {length} tokens; at least 26 are needed"):
        measure(model, prompts(60, length), REACH)


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from server.cli import main

    with pytest.raises(SystemExit) as caught:
        main(["head-gates", str(tmp_path / "no.txt"), "--output", str(tmp_path / "gates.tsv")])
    assert caught.value.code == 2
    assert "No such file" in capsys.readouterr().err
