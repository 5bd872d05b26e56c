"""Which of a model's layers are ours: those of full attention with a KV cache of their own."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import AttentionSpec

from attention_plugins.vllm_adapter.split import SplitImpl
from kvcache.vllm_adapter.manager import CompressibleAttentionSpec, compressible


def compressible_layers(config: VllmConfig) -> list[Any]:
    """The loaded model's full-attention layers in order; layer i of the compressor is the i-th of them.

    Raises:
        ValueError: there is none, there are several in one decoder layer, or some differ in their heads.
    """
    context: dict[str, Any] = config.compilation_config.static_forward_context
    found = {name: layer for name, layer in context.items() if _is_ours(layer, config)}
    if not found:
        raise ValueError("KV compression needs full-attention layers; the model has none")
    layers = sorted(found.values(), key=lambda layer: extract_layer_index(layer.layer_name))
    numbers = Counter(extract_layer_index(name) for name in found)
    if most := [number for number, times in numbers.items() if times > 1]:
        raise ValueError(f"KV compression expects one attention layer per decoder layer; {most} have several")
    shapes = {(layer.num_heads, layer.num_kv_heads, layer.head_size, layer.impl.scale) for layer in layers}
    if len(shapes) > 1:
        raise ValueError(f"KV compression needs full-attention layers of one shape; got {sorted(shapes)}")
    return layers


def _is_ours(layer: Any, config: VllmConfig) -> bool:
    if not isinstance(layer, AttentionLayerBase) or layer.is_draft_layer:
        return False
    spec = layer.get_kv_cache_spec(config)
    return isinstance(spec, AttentionSpec) and isinstance(compressible(spec), CompressibleAttentionSpec)


def refuse_variants(layer: Any, selectors: bool) -> None:
    """Refuse what the check of the configuration can't foresee for every model.

    Args:
        selectors: whether the server has some.

    Raises:
        ValueError: the layer's attention has a part that compacted rows, or readers, would leave out.
    """
    impl = layer.impl
    if not isinstance(impl, SplitImpl):
        raise ValueError(f"{layer.layer_name} has an attention backend of its own: not supported with KV compression")
    found = [
        (selectors and getattr(impl, "sinks", None) is not None, "learned attention sinks, which selectors don't know"),
        (selectors and impl.logits_soft_cap, "a soft cap on its logits, which selectors don't know"),
        (getattr(impl, "alibi_slopes", None) is not None, "ALiBi"),
        (getattr(impl, "kv_sharing_target_layer_name", None) is not None, "KV cache shared between layers"),
        (impl.sliding_window not in (-1, (-1, -1)), "a sliding window"),
        (getattr(impl, "vllm_flash_attn_version", None) not in (None, 2, 3), "FlashAttention 4"),
    ]
    if names := [name for bad, name in found if bad]:
        raise ValueError(f"{layer.layer_name} has {', '.join(names)}: not supported with KV compression")
