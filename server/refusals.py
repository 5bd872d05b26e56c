"""What this release doesn't do together with KV compression, refused at start-up by name."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from attention_plugins.decode.settings import DecodeSettings
from server.errors import StartError

_CACHES = {"cpu": ("auto", "float16", "bfloat16"), "cuda": ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3")}
_BACKENDS = (None, "FLASH_ATTN", "CUSTOM")


class Unsupported(StartError):
    """The asked-for combination is not supported; the message names everything and what to change."""


def refuse_args(args: Namespace, compresses: bool) -> None:
    """Refuse what vLLM's flags alone show.

    Args:
        args: vLLM's arguments.
        compresses: whether policies can run here; without them only what our one server process can't do is refused.

    Raises:
        Unsupported: names the flags.
    """
    found = [
        (args.headless, "--headless"),
        (args.grpc, "--grpc"),
        ((args.api_server_count or 1) > 1, "--api-server-count above 1"),
        (args.data_parallel_multi_port_external_lb, "--data-parallel-multi-port-external-lb"),
        (compresses and args.scheduler_cls is not None, "--scheduler-cls"),
        (compresses and args.worker_cls != "auto", "--worker-cls"),
        (compresses and _backend(args) not in _BACKENDS, f"--attention-backend {_backend(args)}"),
    ]
    if names := [flag for bad, flag in found if bad]:
        raise Unsupported(f"{', '.join(names)}: not supported; leave it out, or use stock `vllm serve`.")


def refuse_config(config: Any, platform: str) -> None:
    """Refuse what only vLLM's resolved configuration (`VllmConfig`) shows.

    Args:
        platform: `cpu` or `cuda`.

    Raises:
        Unsupported: names the features and what to change.
    """
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    text = model.hf_text_config
    found = [
        (model.runner_type != "generate", f"models that don't generate text (runner {model.runner_type})"),
        (model.use_mla, "multi-head latent attention (MLA)"),
        (model.is_encoder_decoder, "encoder-decoder models"),
        (model.is_multimodal_model, "multi-modal models"),
        (model.is_hybrid or model.is_attention_free, "hybrid and attention-free models"),
        (model.is_diffusion, "diffusion models"),
        (_slides(model, text), "sliding-window or chunked attention"),
        (model.uses_alibi, "ALiBi"),
        (_has_sinks(text), "learned attention sinks"),
        (
            bool(
                getattr(text, "attn_logit_softcapping", None) and DecodeSettings.of(config.additional_config).selectors
            ),
            "decode selectors with attention logits that have a soft cap (--decode-selectors none does without)",
        ),
        (config.speculative_config is not None, "speculative decoding (--speculative-config)"),
        (
            config.kv_transfer_config is not None,
            "KV connectors and offloading (--kv-transfer-config, --kv-offloading-size)",
        ),
        (parallel.pipeline_parallel_size > 1, "pipeline parallel (--pipeline-parallel-size)"),
        (parallel.data_parallel_size > 1, "data parallel (--data-parallel-size)"),
        (
            parallel.tensor_parallel_size > 1 and platform == "cpu",
            "tensor parallel on this platform (--tensor-parallel-size)",
        ),
        (parallel.use_ubatching, "dual batch overlap (--enable-dbo)"),
        (parallel.decode_context_parallel_size > 1, "decode context parallel (--decode-context-parallel-size)"),
        (parallel.prefill_context_parallel_size > 1, "prefill context parallel (--prefill-context-parallel-size)"),
        (
            cache.cache_dtype not in _CACHES[platform],
            f"this KV cache on this platform (--kv-cache-dtype {cache.cache_dtype}; {', '.join(_CACHES[platform])})",
        ),
        (
            config.use_v2_model_runner != (platform == "cuda"),
            f"Model Runner V{1 + config.use_v2_model_runner} on this platform (VLLM_USE_V2_MODEL_RUNNER)",
        ),
    ]
    if names := [what for bad, what in found if bad]:
        raise Unsupported(
            f"not supported with KV compression in this release: {'; '.join(names)}. "
            "Leave it out, choose another model, or use stock `vllm serve`."
        )


def _backend(args: Namespace) -> str | None:
    """The attention backend that the user asked for."""
    asked = args.attention_backend or args.attention_config.backend
    name = getattr(asked, "name", asked)
    return None if name is None or str(name).lower() == "auto" else str(name).upper()


def _slides(model: Any, text: Any) -> bool:
    """Whether some layer doesn't see the whole context. `--disable-sliding-window` leaves full attention."""
    kinds = set() if model.disable_sliding_window else set(getattr(text, "layer_types", None) or ())
    return (
        model.get_sliding_window() is not None
        or getattr(text, "attention_chunk_size", None) is not None
        or any("sliding" in kind or "chunked" in kind for kind in kinds)
    )


def _caps_logits(text: Any) -> bool:
    """Whether attention logits have a soft cap, as in Gemma 2."""
    return bool(getattr(text, "attn_logit_softcapping", None))


def _has_sinks(text: Any) -> bool:
    """Whether layers add a learned logit to the softmax, as in gpt-oss and some Granite models."""
    if text.model_type in ("granite", "granitemoe"):  # what vLLM's models read: layer types imply sinks
        return bool(getattr(text, "attention_sinks", getattr(text, "layer_types", None) is not None))
    return text.model_type == "gpt_oss"
