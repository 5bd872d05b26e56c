"""Files of `longreach calibrate`: what selectors and patterns have to know of a model beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from attention_plugins.decode.loki import BASIS
from attention_plugins.prefill.minference import TABLE, Kind
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
    where = f"--decode-calibration {file}"
    found = _load(where, file, "longreach calibrate")
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


def read_head_tables(file: str | Path, model: tuple[int, int] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a file of `longreach calibrate --prefill`, by name.

    Args:
        model: layers and query heads of the served model, once it is known.

    Raises:
        StartError: the file can't be read, lacks the table, or is of another model.
    """
    where = f"--prefill-calibration {file}"
    found = _load(where, file, "longreach calibrate --prefill")
    if TABLE not in found:
        raise StartError(f"{where}: lacks {TABLE}; write it with `longreach calibrate --prefill`")
    table = found[TABLE]
    if table.dtype != torch.int64 or table.ndim != 3 or table.shape[2] != 3:
        problem = f"{TABLE} must be int64 [layers, heads, 3], is {table.dtype} {list(table.shape)}"
    elif bool((table < 0).any()) or int(table[..., 0].max()) >= len(Kind):
        problem = f"{TABLE} holds kinds or sizes that there aren't"
    elif model is not None and tuple(table.shape[:2]) != model:
        problem = (
            f"{TABLE} is of {table.shape[0]} layers and {table.shape[1]} heads, the model has {model[0]} and {model[1]}"
        )
    else:
        return found
    raise StartError(f"{where}: {problem}; measure this model with `longreach calibrate --prefill`")


def _load(where: str, file: str | Path, writer: str) -> dict[str, torch.Tensor]:
    """
    Raises:
        StartError: the file can't be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, torch.Tensor] = load_file(Path(file).expanduser())
    except (OSError, SafetensorError) as error:
        raise StartError(f"{where}: can't be read as safetensors: {one_line(error)}; `{writer}` writes it") from None
    return found
