"""A small random LoRA adapter for any model whose attention has projections of the usual names."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

RANK = 8


def write_adapter(config: dict[str, int], folder: Path, seed: int) -> Path:
    """Write an adapter of query and value projections.

    Args:
        config: the model's `config.json`.
        seed: of its weights.

    Returns:
        The folder.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    outputs = {"q_proj": heads * size, "v_proj": config.get("num_key_value_heads", heads) * size}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, out in outputs.items():
            part = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{part}.lora_A.weight"] = torch.randn(RANK, hidden, generator=generator) / hidden**0.5
            weights[f"{part}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) / 20
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": sorted(outputs), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder
