"""A Llama checkpoint with more KV heads than it has, or wider ones, and the same answers: what is new is zero.

python -m benchmarks.gpu.pad_heads SOURCE TARGET --kv-heads N | --head-dim D

A model's KV heads must divide by the number of GPUs; those of the embedded model (3) don't divide by 2. And
FlashAttention 3 is invariant to the batch with heads of 128, not with the embedded model's of 64
(`benchmarks.gpu.invariance`).
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def pad_heads(source: Path, target: Path, kv_heads: int) -> Path:
    """Write the checkpoint of `source` with `kv_heads` KV heads into the folder `target`, which is returned.

    The rows of new heads in the query, key and value projections are zero, so their attention gives zeros, and so are
    their columns in the output projection.
    """
    config, weights = _load(source)
    old, heads, dim = _shape(config)
    more = (kv_heads - old) * dim
    grown = {"q_proj": more * (heads // old), "k_proj": more, "v_proj": more}
    for name, weight in weights.items():
        part = name.removesuffix(".weight").rpartition(".")[2]
        if part in grown:
            weights[name] = torch.cat([weight, weight.new_zeros(grown[part], weight.shape[1])])
        elif part == "o_proj":
            weights[name] = torch.cat([weight, weight.new_zeros(weight.shape[0], grown["q_proj"])], 1)
    config |= {"num_key_value_heads": kv_heads, "num_attention_heads": kv_heads * (heads // old), "head_dim": dim}
    return _save(source, target, config, weights)


def widen_heads(source: Path, target: Path, head_dim: int) -> Path:
    """Write the checkpoint of `source` with heads of `head_dim` into the folder `target`, which is returned.

    Rotary halves stay halves: old channels are the first of each half. RoPE's base becomes its power of new by old
    size, which leaves the frequencies of the first channels as they were; queries are multiplied by the root of this
    ratio, since attention divides them by that of the size.

    Raises:
        ValueError: the model rotates otherwise than with default RoPE.
    """
    config, weights = _load(source)
    kv_heads, heads, dim = _shape(config)
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": "default"}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{source}: RoPE of type {rope['rope_type']}")
    ratio, half = head_dim / dim, dim // 2
    channels = torch.cat([torch.arange(half), head_dim // 2 + torch.arange(half)])

    def spread(weight: torch.Tensor, number: int) -> torch.Tensor:
        wide = weight.new_zeros(number, head_dim, weight.shape[1])
        wide[:, channels] = weight.view(number, dim, -1)
        return wide.flatten(0, 1)

    for name, weight in weights.items():
        part = name.removesuffix(".weight").rpartition(".")[2]
        if part == "q_proj":
            weights[name] = spread((weight.float() * ratio**0.5).to(weight.dtype), heads)
        elif part in ("k_proj", "v_proj"):
            weights[name] = spread(weight, kv_heads)
        elif part == "o_proj":
            weights[name] = spread(weight.T, heads).T.contiguous()
    config |= {"head_dim": head_dim, "rope_parameters": {**rope, "rope_theta": rope["rope_theta"] ** ratio}}
    config.pop("rope_theta", None)
    return _save(source, target, config, weights)


def _load(source: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    weights = {name: w for file in sorted(source.glob("*.safetensors")) for name, w in load_file(file).items()}
    return json.loads((source / "config.json").read_text()), weights


def _shape(config: dict[str, Any]) -> tuple[int, int, int]:
    """KV heads, heads, and their size."""
    heads = config["num_attention_heads"]
    return config["num_key_value_heads"], heads, config.get("head_dim") or config["hidden_size"] // heads


def _save(source: Path, target: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    change = parser.add_mutually_exclusive_group(required=True)
    change.add_argument("--kv-heads", type=int, help="so many")
    change.add_argument("--head-dim", type=int, help="so wide")
    args = parser.parse_args()
    if args.kv_heads:
        pad_heads(args.source, args.target, args.kv_heads)
    else:
        widen_heads(args.source, args.target, args.head_dim)


if __name__ == "__main__":
    main()
