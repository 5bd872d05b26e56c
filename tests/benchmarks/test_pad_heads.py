from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.gpu.pad_heads import pad_heads, widen_heads
from tests.tiny_model import VOCABULARY, write_tiny_model


def test_a_padded_model_is_the_same_function(tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(write_tiny_model(tmp_path / "model"))
    padded = LlamaForCausalLM.from_pretrained(pad_heads(tmp_path / "model", tmp_path / "padded", 8))
    assert padded.config.num_key_value_heads == 8 and padded.config.num_attention_heads == 16
    tokens = torch.randint(VOCABULARY, (2, 40))
    torch.testing.assert_close(padded(tokens).logits, model(tokens).logits)


def test_a_widened_model_is_the_same_function(tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(write_tiny_model(tmp_path / "model"))
    wide = LlamaForCausalLM.from_pretrained(widen_heads(tmp_path / "model", tmp_path / "wide", 128))
    assert wide.config.head_dim == 128 and wide.model.layers[0].self_attn.k_proj.out_features == 2 * 128
    tokens = torch.randint(VOCABULARY, (2, 40))
    torch.testing.assert_close(wide(tokens).logits, model(tokens).logits, atol=1e-4, rtol=1e-3)


def test_scaled_rope_is_refused(tmp_path: Path) -> None:
    config = write_tiny_model(tmp_path / "model") / "config.json"
    known = json.loads(config.read_text())
    config.write_text(json.dumps({**known, "rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0}}))
    with pytest.raises(ValueError, match="yarn"):
        widen_heads(tmp_path / "model", tmp_path / "wide", 128)
