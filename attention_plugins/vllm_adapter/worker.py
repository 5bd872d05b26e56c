"""What our workers have in common: the compressor over the engine's KV cache, and the reports' way back."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index


def attention_layers(config: VllmConfig) -> list[Any]:
    """The model's attention layers in order; layer i is layer i of the compressor.

    Raises:
        ValueError: the model has other layers with a KV cache, or several per decoder layer.
    """
    context = config.compilation_config.static_forward_context
    by_index = {extract_layer_index(name): layer for name, layer in context.items() if hasattr(layer, "kv_cache")}
    if sorted(by_index) != list(range(len(context))):
        raise ValueError(f"KV compression expects one attention layer per decoder layer; got {list(context)}")
    return [by_index[index] for index in range(len(by_index))]


def keeps_positions(config: VllmConfig) -> bool:
    """Whether tests asked the compressor to remember kept positions (`additional_config`)."""
    return bool((config.additional_config or {}).get("longreach", {}).get("keep_positions"))


def set_pages(layers: list[Any], pages: torch.Tensor, page_size: int) -> None:
    """Let the attention layers read pages of the whole cache."""
    for layer in layers:
        layer.impl.pages, layer.impl.page_size = pages, page_size
