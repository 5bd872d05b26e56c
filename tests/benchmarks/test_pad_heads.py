from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from benchmarks.gpu.pad_heads import pad_heads
from tests.tiny_model import VOCABULARY, write_tiny_model


def test_a_padded_model_is_the_same_function(tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(write_tiny_model(tmp_path / "model"))
    padded = LlamaForCausalLM.from_pretrained(pad_heads(tmp_path / "model", tmp_path / "padded", 8))
    assert padded.config.num_key_value_heads == 8 and padded.config.num_attention_heads == 16
    tokens = torch.randint(VOCABULARY, (2, 40))
    torch.testing.assert_close(padded(tokens).logits, model(tokens).logits)
