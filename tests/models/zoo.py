"""Small random checkpoints of the architectures that people run, each with some of the shapes that occur."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from server.cpus import lacks_avx512

VOCABULARY, MAX_LEN, WINDOW = 512, 2048, 96
AVX2 = "avx2"


@dataclass(frozen=True)
class Specimen:
    """One architecture.

    Attributes:
        kind: of transformers' configuration class, less "Config".
        shape: its arguments beside `COMMON`.
        full: indices of the full-attention layers; the others' caches stay vLLM's.
        dtype: that it is served in.
        exact: whether transformers' text in float32 is to be the same.
        selectors: whether they know its attention.
        experts: whether it is a mixture of them.
        quantised: whether its weights are; then there are none in the folder, and vLLM makes some up.
        refused: why it isn't served there, by platform; `AVX2`: on CPUs that have no more.
        attention: what its layers' attention is called.
    """

    kind: str
    shape: dict[str, Any]
    full: tuple[int, ...]
    dtype: str = "float32"
    exact: bool = True
    selectors: bool = True
    experts: bool = False
    quantised: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)
    attention: str = "self_attn.attn"

    def refusal(self, platform: str) -> str | None:
        """Why it isn't served on that platform (`cpu`: of this machine), or None."""
        here = AVX2 if platform == "cpu" and lacks_avx512() else platform
        return self.refused.get(platform, self.refused.get(here))


def heads(query: int, kv: int, size: int) -> dict[str, int]:
    return {"num_attention_heads": query, "num_key_value_heads": kv, "head_dim": size}


COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "max_position_embeddings": MAX_LEN, "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
    # Large weights make attention peaked, so that a wrong token in the cache changes the answer.
    "initializer_range": 0.25,
}  # fmt: skip
_SLIDE = {"sliding_window": WINDOW}
_GEMMA = [*["sliding_attention"] * 2, "full_attention"] * 2
_TURNS = ["sliding_attention", "full_attention"] * 2
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}


def _compressed(fmt: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """Of compressed-tensors."""
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": fmt, "quantization_status": "compressed",
            "config_groups": {"group_0": scheme}, "ignore": ["lm_head"], "kv_cache_scheme": None}  # fmt: skip


def _numbers(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False, **more}


QUANTISED: dict[str, dict[str, Any]] = {
    "w8a8": _compressed(
        "int-quantized", _numbers(8, "int", "channel"), {**_numbers(8, "int", "token"), "dynamic": True}
    ),
    "w4a16": _compressed("pack-quantized", _numbers(4, "int", "group", group_size=128)),
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
}
"""Quantisations of weights, as `config.json` tells them."""

_FOUR_BITS = {AVX2: "4-bit weights on x86 CPUs without AVX-512"}
_REFUSED = {"fp8": {"cpu": "FP8 weights on CPUs"}, "w4a16": _FOUR_BITS, "awq": _FOUR_BITS, "gptq": _FOUR_BITS}

ZOO: dict[str, Specimen] = {
    "llama-llama3-rope": Specimen(
        "Llama",
        {**heads(4, 1, 64), "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 512}},
        (0, 1, 2),
    ),
    "qwen2-yarn": Specimen(
        "Qwen2",
        {**heads(4, 2, 32), "hidden_size": 128, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 512}},
        (0, 1, 2),
    ),
    "qwen3-bfloat16": Specimen("Qwen3", heads(16, 1, 128), (0, 1, 2), dtype="bfloat16", exact=False),
    "qwen3-moe": Specimen("Qwen3Moe", {**heads(4, 2, 64), **_MOE}, (0, 1, 2), experts=True),
    "mistral-float16": Specimen(
        "Mistral", {**heads(8, 2, 64), "sliding_window": None, "initializer_range": 0.1}, (0, 1, 2), dtype="float16",
        exact=False,
    ),
    "gemma3": Specimen(
        "Gemma3Text",
        {**heads(4, 1, 256), **_SLIDE, "num_hidden_layers": 6, "layer_types": _GEMMA, "query_pre_attn_scalar": 256},
        (2, 5),
    ),
    "gemma2": Specimen(
        "Gemma2",
        {**heads(4, 2, 128), **_SLIDE, "num_hidden_layers": 4, "layer_types": _TURNS, "query_pre_attn_scalar": 128,
         "attn_logit_softcapping": 20.0, "final_logit_softcapping": 30.0, "tie_word_embeddings": True},
        (1, 3),
        selectors=False,
    ),
    "gpt-oss": Specimen(
        "GptOss",
        {**heads(8, 2, 64), **_SLIDE, "num_hidden_layers": 4, "layer_types": _TURNS, "num_local_experts": 4,
         "num_experts_per_tok": 2, "intermediate_size": 64,
         "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0,
                             "beta_slow": 1.0, "original_max_position_embeddings": 512}},
        (1, 3),
        selectors=False,
        experts=True,
        attention="attn.attn",
    ),
    "llama4-chunked": Specimen(
        "Llama4Text",
        {**heads(4, 2, 64), "attention_chunk_size": 96, "num_hidden_layers": 4, "num_local_experts": 2,
         "intermediate_size_mlp": 128, "no_rope_layers": [1, 0, 1, 0],
         "layer_types": ["chunked_attention", "full_attention"] * 2},
        (1, 3),
        exact=False,
        experts=True,
    ),
    "qwen3-next": Specimen(
        "Qwen3Next",
        {**heads(4, 2, 256), "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
         "linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 128,
         "linear_value_head_dim": 128, "num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 64,
         "shared_expert_intermediate_size": 64},
        (1, 3),
        dtype="bfloat16",
        exact=False,
        experts=True,
        refused={"cuda": "linear or Mamba layers on GPUs"},
    ),
    "phi3-longrope": Specimen(
        "Phi3",
        {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 128, "partial_rotary_factor": 0.5,
         "sliding_window": None, "original_max_position_embeddings": 512,
         "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                             "short_factor": [1.0] * 16, "long_factor": [2.0] * 16,
                             "original_max_position_embeddings": 512}},
        (0, 1, 2),
    ),
    "glm4-partial-rope": Specimen("Glm4", {**heads(8, 2, 64), "partial_rotary_factor": 0.5}, (0, 1, 2)),
    **{
        f"llama-{name}": Specimen(
            "Llama",
            {**heads(4, 2, 64), "hidden_size": 256, "intermediate_size": 512, "quantization_config": config},
            (0, 1, 2),
            dtype="bfloat16",
            exact=False,
            quantised=True,
            refused=_REFUSED.get(name, {}),
        )
        for name, config in QUANTISED.items()
    },
    "stablelm-partial-rope": Specimen(
        "StableLm",
        {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 128, "partial_rotary_factor": 0.25},
        (0, 1, 2),
    ),
}  # fmt: skip


def write(name: str, folder: Path) -> Path:
    """Write a checkpoint, always with the same weights, and return its folder."""
    specimen = ZOO[name]
    torch.manual_seed(0)
    make: Callable[..., Any] = getattr(transformers, f"{specimen.kind}Config")
    config = make(**{**COMMON, **specimen.shape}, dtype=torch.float32)
    if specimen.quantised:
        config.save_pretrained(folder)
        return folder
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter, weights in model.named_parameters():
        if specimen.kind.startswith("Gemma") and "post_attention" in parameter:
            # What attention says must outweigh the last token.
            torch.nn.init.constant_(weights, 39.0 if int(parameter.split(".")[2]) in specimen.full else 9.0)
        if specimen.kind.startswith("Gemma") and ("q_norm" in parameter or "k_norm" in parameter):
            torch.nn.init.constant_(weights, 2.0)
    model.save_pretrained(folder)
    return folder
