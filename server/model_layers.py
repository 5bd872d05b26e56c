"""What kinds of layers a model has, from its configuration alone."""

from __future__ import annotations

from typing import Any

FULL, SLIDING, CHUNKED, LINEAR = "full attention", "sliding window", "chunked attention", "linear or Mamba"
_KINDS = {
    "full_attention": FULL,
    "attention": FULL,
    "hybrid": FULL,  # a layer with both has full attention
    "sliding_attention": SLIDING,
    "chunked_attention": CHUNKED,
    "linear_attention": LINEAR,
    "mamba": LINEAR,
    "conv": LINEAR,
}


def layer_kinds(config: Any) -> list[str]:
    """The kind of each layer, as vLLM builds it.

    Args:
        config: vLLM's resolved configuration (`VllmConfig`).

    Returns:
        One of this module's names for each layer; a name of vLLM's that we don't know stays as it is.
    """
    model, text = config.model_config, config.model_config.hf_text_config
    number = model.get_total_num_hidden_layers()
    if model.is_attention_free:
        return [LINEAR] * number
    told = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if config.cache_config.sliding_window is not None:
        return [SLIDING] * number  # vLLM's layers take it where the configuration tells of no kinds
    if told is None:
        if getattr(text, "attention_chunk_size", None) is not None:
            return [CHUNKED] * number
        return [FULL] * number
    kinds = [_KINDS.get(kind, kind) for kind in told]
    if model.disable_sliding_window or not getattr(text, "sliding_window", None):
        kinds = [FULL if kind == SLIDING else kind for kind in kinds]
    return kinds


def full_layers(config: Any) -> list[int]:
    """Indices of the layers whose cache can shrink."""
    return [index for index, kind in enumerate(layer_kinds(config)) if kind == FULL]
