"""Finds how the running model rotates its queries and keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding, RotaryEmbeddingBase

from kvcache.rotary import Rotary

# Their modules have a rotary embedding that some layers don't use, or do something after it (as norms of queries).
_IRREGULAR = frozenset(
    (
        "afmoe",
        "cohere2",
        "cohere2_moe",
        "exaone4",
        "exaone_moe",
        "llama4_text",
        "muse_glimmer",
        "olmo_hybrid",
        "step3p5",
    )
)


class UnknownRotary(Exception):
    """The model's rotation isn't one that can be undone; the message says why."""


def find_rotary(model: torch.nn.Module, layers: Sequence[torch.nn.Module], model_type: str) -> Rotary:
    """The rotation of all layers, its table not copied.

    Args:
        model: the loaded model.
        layers: vLLM's attention layers; each is part of a module that has the rotary embedding beside it.
        model_type: of the model's configuration.

    Raises:
        UnknownRotary: there is none, there are several, or one that isn't a table looked up by position.
    """
    if model_type in _IRREGULAR:
        raise UnknownRotary(f"models of type {model_type} don't rotate all queries alike, or change them afterwards")
    wanted, found = set(map(id, layers)), dict[int, RotaryEmbeddingBase]()
    for module in model.modules():
        children = list(module.children())
        if attention := [child for child in children if id(child) in wanted]:
            rotary = [child for child in children if isinstance(child, RotaryEmbeddingBase)]
            if len(rotary) != 1:
                raise UnknownRotary("the model has layers without a rotary embedding of vLLM's")
            found[id(rotary[0])] = rotary[0]
            wanted -= set(map(id, attention))
    if wanted:
        raise UnknownRotary("the model's attention layers are not where its rotary embedding is")
    if len(found) != 1:
        raise UnknownRotary("the model's layers have different rotary embeddings")
    return _read(next(iter(found.values())))


def _read(embedding: RotaryEmbeddingBase) -> Rotary:
    kind, stock = type(embedding), RotaryEmbedding
    # Scalings (Llama 3, NTK, YaRN) fill the table their own way; anything else (several axes, switched tables) has a
    # forward pass of its own.
    forwards = ("forward", "forward_native", "forward_cuda", "forward_cpu")
    if not all(getattr(kind, name) is getattr(stock, name) for name in forwards):
        raise UnknownRotary(f"the model's rotary embedding ({kind.__name__}) is not a table looked up by position")
    table = embedding.cos_sin_cache
    if table.ndim != 2 or table.shape[1] != embedding.rotary_dim:
        raise UnknownRotary(f"the table of the model's rotary embedding ({kind.__name__}) has an unknown layout")
    return Rotary(table, bool(embedding.is_neox_style))
