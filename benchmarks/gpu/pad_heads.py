"""A Llama checkpoint with more KV heads than it has, and the same answers: the new heads' weights are zero.

A model's KV heads must divide by the number of GPUs; those of the embedded model (3) don't divide by 2.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def pad_heads(source: Path, target: Path, kv_heads: int) -> Path:
    """Write the checkpoint of `source` with `kv_heads` KV heads into the folder `target`, which is returned.

    The rows of new heads in the query, key and value projections are zero, so their attention gives zeros, and so are
    their columns in the output projection.
    """
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((source / "config.json").read_text())
    old, heads = config["num_key_value_heads"], config["num_attention_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    more = (kv_heads - old) * dim
    grown = {"q_proj": more * (heads // old), "k_proj": more, "v_proj": more}
    weights = {name: w for file in sorted(source.glob("*.safetensors")) for name, w in load_file(file).items()}
    for name, weight in weights.items():
        part = name.removesuffix(".weight").rpartition(".")[2]
        if part in grown:
            weights[name] = torch.cat([weight, weight.new_zeros(grown[part], weight.shape[1])])
        elif part == "o_proj":
            weights[name] = torch.cat([weight, weight.new_zeros(weight.shape[0], grown["q_proj"])], 1)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config |= {"num_key_value_heads": kv_heads, "num_attention_heads": kv_heads * (heads // old), "head_dim": dim}
    (target / "config.json").write_text(json.dumps(config))
    return target
