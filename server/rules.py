"""What policies, selectors and patterns can't be used with: one list, for refusals, `longreach doctor` and docs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from server.cpus import lacks_avx512
from server.model_layers import CHUNKED, FULL, LINEAR, SLIDING, layer_kinds

POLICIES, SELECTORS, PATTERNS = "KV-cache policies", "decode selectors", "prefill patterns"
CACHES = {"cpu": ("auto", "float16", "bfloat16"), "cuda": ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3")}

CPU_HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of vLLM's CPU attention kernel; vLLM has a list, too, which lacks 48 and isn't looked at on CPUs."""


@dataclass(frozen=True)
class Rule:
    """One thing that a model or a setting may have.

    Attributes:
        name: as messages and tables say it.
        found: whether vLLM's configuration (`VllmConfig`) has it, on a platform (`cpu` or `cuda`).
        change: what to change.
        refuses: which of our features can't be used then.
        flag: vLLM's, where it is a setting.
        why: for the table in the docs.
    """

    name: str
    found: Callable[[Any, str], bool]
    change: str = ""
    refuses: tuple[str, ...] = (POLICIES, SELECTORS, PATTERNS)
    flag: str = ""
    why: str = ""

    def told(self, config: Any, platform: str) -> str:
        """In a message."""
        told = " ".join(part for part in (self.flag, _value(self.flag, config, platform)) if part)
        return f"{self.name} ({told})" if told else f"{self.name}{f' ({self.change})' if self.change else ''}"


def _value(flag: str, config: Any, platform: str) -> str:
    return f"{config.cache_config.cache_dtype}; {', '.join(CACHES[platform])}" if flag == "--kv-cache-dtype" else ""


def _text(config: Any) -> Any:
    return config.model_config.hf_text_config


def _has_sinks(config: Any, platform: str) -> bool:
    """Whether layers add a learned logit to the softmax, as in gpt-oss and some Granite models."""
    text = _text(config)
    if text.model_type in ("granite", "granitemoe"):  # what vLLM's models read: layer types imply sinks
        return bool(getattr(text, "attention_sinks", getattr(text, "layer_types", None) is not None))
    return bool(text.model_type == "gpt_oss")


def _caps_logits(config: Any, platform: str) -> bool:
    """Whether attention logits have a soft cap, as in Gemma 2."""
    return bool(getattr(_text(config), "attn_logit_softcapping", None))


def _packs_weights(config: Any) -> bool:
    """AWQ, GPTQ, and compressed-tensors' `pack-quantized`."""
    told = getattr(config.model_config.hf_config, "quantization_config", None) or {}
    return told.get("quant_method") in ("awq", "gptq") or told.get("format") == "pack-quantized"


def _no_cpu_kernel(config: Any, platform: str) -> bool:
    return (
        platform == "cpu" and FULL in layer_kinds(config) and config.model_config.get_head_size() not in CPU_HEAD_SIZES
    )


def _no_full_attention(config: Any, platform: str) -> bool:
    return FULL not in layer_kinds(config)


def _several_groups(config: Any, platform: str) -> bool:
    """vLLM cuts the layers into groups as small as the smallest kind, unless kinds are nearly as many."""
    kinds = layer_kinds(config)
    full, others = kinds.count(FULL), [kinds.count(kind) for kind in {*kinds} - {FULL}]
    return bool(full and others and full > min(others) and max(full, *others) >= 1.5 * min(full, *others))


def _mixed(config: Any) -> bool:
    return len(set(layer_kinds(config))) > 1


MODELS: tuple[Rule, ...] = (
    Rule("models that don't generate text", lambda config, _: config.model_config.runner_type != "generate"),
    Rule("multi-head latent attention (MLA)", lambda config, _: config.model_config.use_mla,
         why="its cache has one latent vector a token, which policies and kernels don't know"),
    Rule("encoder-decoder models", lambda config, _: config.model_config.is_encoder_decoder,
         why="two caches a layer"),
    Rule("multi-modal models", lambda config, _: config.model_config.is_multimodal_model,
         "a checkpoint of its text model is served", why="not tried; a checkpoint of the text model alone is served"),
    Rule("diffusion models", lambda config, _: config.model_config.is_diffusion,
         why="they write tokens out of order"),
    Rule("models without a full-attention layer", _no_full_attention,
         why="windows, chunks and states don't grow with the context: there is nothing to compress"),
    Rule("more full-attention layers than others, in several KV cache groups", _several_groups,
         why="a request's pages would lie in several block tables"),
    Rule("one KV cache for all kinds of layers", lambda config, _: _mixed(config)
         and config.scheduler_config.disable_hybrid_kv_cache_manager, flag="--disable-hybrid-kv-cache-manager"),
    Rule("linear or Mamba layers on GPUs", lambda config, platform: platform == "cuda"
         and config.model_config.is_hybrid,
         why="not tried: pages are as large there as vLLM makes a state"),
    Rule("layers of kinds that this release doesn't know", lambda config, _: not {*layer_kinds(config)}
         <= {FULL, SLIDING, CHUNKED, LINEAR}, why="nobody has looked at them"),
    Rule("KV cache shared between layers", lambda config, _: bool(getattr(_text(config), "num_kv_shared_layers", 0)),
         why="queries of several layers would have to be looked at for one cache"),
    Rule("full-attention layers with heads of another size than the others'", lambda config, _: bool(
         getattr(_text(config), "global_head_dim", None)) and _mixed(config),
         why="vLLM pads or rescales pages then"),
    Rule("ALiBi", lambda config, _: config.model_config.uses_alibi, why="distances change when tokens leave the cache"),
    Rule("learned attention sinks", _has_sinks, "--decode-selectors none does without", (SELECTORS, PATTERNS),
         why="readers and estimators have no sink; policies' attention has"),
    Rule("soft caps on attention logits", _caps_logits,
         "--decode-selectors none does without", (SELECTORS, PATTERNS), why="readers and estimators have no cap"),
    Rule("full-attention heads of a size that vLLM's CPU kernel doesn't have", _no_cpu_kernel,
         f"it has {', '.join(map(str, CPU_HEAD_SIZES))}",
         why="vLLM itself starts, and its engine dies at the first request"),
    Rule("FP8 weights on CPUs", lambda config, platform: platform == "cpu"
         and config.model_config.quantization == "fp8", why="vLLM's CPU build has no kernel for them"),
    Rule("4-bit weights on x86 CPUs without AVX-512", lambda config, platform: platform == "cpu"
         and _packs_weights(config) and lacks_avx512(),
         why="vLLM's build for AVX2 lacks their kernel: it starts, and its engine dies at the first request"),
)  # fmt: skip
"""Of models; what isn't refused works."""

SETTINGS: tuple[Rule, ...] = (
    Rule("speculative decoding", lambda config, _: config.speculative_config is not None, flag="--speculative-config",
         why="steps of several tokens may pass the places where an answer is compacted, and CUDA graphs of compacted "
         "rows have one token a row"),
    Rule("KV connectors and offloading", lambda config, _: config.kv_transfer_config is not None,
         flag="--kv-transfer-config, --kv-offloading-size",
         why="they move blocks by their hashes' tokens; a compacted request's aren't what these say"),
    Rule("pipeline parallel", lambda config, _: config.parallel_config.pipeline_parallel_size > 1,
         flag="--pipeline-parallel-size", why="a request's pages are shared between layers, which would lie on several "
         "GPUs"),
    Rule("data parallel", lambda config, _: config.parallel_config.data_parallel_size > 1, flag="--data-parallel-size",
         why="totals of several engines can't be told apart; start a server for each"),
    Rule("tensor parallel on this platform", lambda config, platform: config.parallel_config.tensor_parallel_size > 1
         and platform == "cpu", flag="--tensor-parallel-size"),
    Rule("dual batch overlap", lambda config, _: config.parallel_config.use_ubatching, flag="--enable-dbo",
         why="each half of a batch has metadata of its own"),
    Rule("decode context parallel", lambda config, _: config.parallel_config.decode_context_parallel_size > 1,
         flag="--decode-context-parallel-size", why="it shards a block's tokens over GPUs"),
    Rule("prefill context parallel", lambda config, _: config.parallel_config.prefill_context_parallel_size > 1,
         flag="--prefill-context-parallel-size", why="as above"),
    Rule("sleep mode", lambda config, _: config.model_config.enable_sleep_mode, flag="--enable-sleep-mode",
         why="page tables would outlive the cache that they point to"),
    Rule("this KV cache on this platform", lambda config, platform: config.cache_config.cache_dtype
         not in CACHES[platform], flag="--kv-cache-dtype", why="pages are moved as the two or one bytes a number that "
         "are listed"),
    Rule("vLLM's other model runner", lambda config, platform: config.use_v2_model_runner != (platform == "cuda"),
         "VLLM_USE_V2_MODEL_RUNNER", why="each adapter is written for one"),
)  # fmt: skip
"""Of the engine's settings."""


WORKS: dict[str, str] = {
    "prefix caching": "tests/engine/test_answers.py",
    "prefix caching beside layers that slide": "tests/models/test_hybrid.py",
    "chunked prefill": "tests/engine/test_answers.py",
    "preemption": "tests/engine/test_memory.py",
    "priority scheduling": "tests/engine/test_features.py",
    "LoRA": "tests/engine/test_features.py",
    "log-probabilities of answers and prompts": "tests/engine/test_features.py",
    "several answers to a prompt (n)": "tests/engine/test_features.py",
    "penalties": "tests/engine/test_features.py",
    "structured output": "tests/e2e/test_api.py",
    "tool calls": "tests/e2e/test_api.py",
}
"""Features of the engine, and the test of each together with compression."""


def refused(config: Any, platform: str, feature: str) -> list[Rule]:
    """Why a feature, `POLICIES`, `SELECTORS` or `PATTERNS`, can't be used with this configuration."""
    return [rule for rule in (*MODELS, *SETTINGS) if feature in rule.refuses and rule.found(config, platform)]
