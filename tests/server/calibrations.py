"""Files of `longreach calibrate`, made up."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file


def tensors(layers: int = 3, heads: int = 2, head_dim: int = 8, rank: int = 4) -> dict[str, torch.Tensor]:
    chosen = torch.tensor([0, layers - 1])
    return {
        "loki.basis": torch.eye(head_dim)[:, :rank].expand(layers, heads, head_dim, rank).contiguous(),
        "tidal.layers": chosen,
        "lessismore.layers": chosen.clone(),
    }


def write(file: Path, **changed: torch.Tensor | None) -> Path:
    """Dots in names are written as `__`; None leaves a tensor out."""
    content = {**tensors(), **{name.replace("__", "."): value for name, value in changed.items()}}
    save_file({name: value for name, value in content.items() if value is not None}, file)
    return file
