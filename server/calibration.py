"""Files of `longreach calibrate`: what selectors have to know of a model beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from attention_plugins.decode.loki import BASIS
from server.errors import StartError, one_line

LAYERS = ("tidal.layers", "lessismore.layers")
"""int64 [n]: the layers that select, in their order."""


@dataclass(frozen=True)
class CacheShape:
    """What a calibration has to fit: of the whole model, not of one GPU's part."""

    num_layers: int
    num_kv_heads: int
    head_dim: int


def read_calibration(file: str | Path, model: CacheShape | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name. Names that we don't know are others' selectors' own.

    Args:
        model: the served model, once it is known.

    Raises:
        StartError: the file can't be read, lacks a tensor, or is of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = f"--decode-calibration {file}"
    try:
        found: dict[str, torch.Tensor] = load_file(Path(file).expanduser())
    except (OSError, SafetensorError) as error:
        raise StartError(f"{where}: can't be read as safetensors: {one_line(error)}") from None
    if missing := [name for name in (BASIS, *LAYERS) if name not in found]:
        raise StartError(f"{where}: lacks {', '.join(missing)}; write it anew with `longreach calibrate`")
    if problem := _problem(found, model):
        raise StartError(f"{where}: {problem}; measure this model with `longreach calibrate`")
    return found


def _problem(found: dict[str, torch.Tensor], model: CacheShape | None) -> str | None:
    """What doesn't fit, or None."""
    basis = found[BASIS]
    if basis.dtype != torch.float32 or basis.ndim != 4 or not 0 < basis.shape[-1] <= basis.shape[-2]:
        return f"{BASIS} must be float32 [layers, KV heads, head_dim, rank], is {basis.dtype} {list(basis.shape)}"
    if not basis.isfinite().all():
        return f"{BASIS} holds something that is no number"
    layers, heads, head_dim = basis.shape[:3]
    if model is not None and (layers, heads, head_dim) != (model.num_layers, model.num_kv_heads, model.head_dim):
        return (
            f"{BASIS} is of {layers} layers, {heads} KV heads and head_dim {head_dim}, the model has "
            f"{model.num_layers}, {model.num_kv_heads} and {model.head_dim}"
        )
    for name in LAYERS:
        chosen = found[name]
        ordered = chosen.ndim == 1 and len(chosen) and bool((chosen.diff() > 0).all())
        if chosen.dtype != torch.int64 or not ordered or not 0 <= chosen[0] <= chosen[-1] < layers:
            return f"{name} must be some of the {layers} layers, int64, in their order, is {chosen.tolist()}"
    return None
