"""What this release doesn't do together with KV compression, refused at start-up by name."""

from __future__ import annotations

from argparse import Namespace
from typing import Any


class Unsupported(ValueError):
    """The asked-for combination is not supported; the message names everything and what to change."""


def refuse_args(args: Namespace) -> None:
    """Refuse what vLLM's flags alone show.

    Raises:
        Unsupported: names the flags.
    """
    found = [
        (args.headless, "--headless"),
        (getattr(args, "grpc", False), "--grpc"),
        ((args.api_server_count or 1) > 1, "--api-server-count above 1"),
        (args.scheduler_cls is not None, "--scheduler-cls"),
        (args.worker_cls != "auto", "--worker-cls"),
    ]
    _raise([f"{flag} is not supported; leave it out" for bad, flag in found if bad])


def refuse_config(config: Any) -> None:
    """Refuse what only vLLM's resolved configuration (`VllmConfig`) shows.

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
        (_slides(model, text), "sliding-window attention"),
        (getattr(text, "position_embedding_type", None) == "alibi" or getattr(text, "alibi", False), "ALiBi"),
        (getattr(text, "model_type", "") == "gpt_oss", "learned attention sinks (gpt-oss)"),
        (config.speculative_config is not None, "speculative decoding (--speculative-config)"),
        (config.kv_transfer_config is not None, "KV connectors (--kv-transfer-config)"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallel (--pipeline-parallel-size)"),
        (parallel.data_parallel_size > 1, "data parallel (--data-parallel-size)"),
        (parallel.tensor_parallel_size > 1, "tensor parallel on this platform (--tensor-parallel-size)"),
        (parallel.decode_context_parallel_size > 1, "decode context parallel"),
        (getattr(parallel, "prefill_context_parallel_size", 1) > 1, "prefill context parallel"),
        (str(cache.cache_dtype).startswith(("fp8", "nvfp4", "int")), f"quantised KV cache ({cache.cache_dtype})"),
        (config.use_v2_model_runner, "Model Runner V2 on this platform (VLLM_USE_V2_MODEL_RUNNER)"),
    ]
    _raise([f"{what}: not supported with KV compression in this release" for bad, what in found if bad])


def _slides(model: Any, text: Any) -> bool:
    kinds = getattr(text, "layer_types", None) or []
    return model.get_sliding_window() is not None or any("sliding" in kind or "chunked" in kind for kind in kinds)


def _raise(problems: list[str]) -> None:
    if problems:
        raise Unsupported(
            "Longreach can't serve this:\n  " + "\n  ".join(problems) + "\nChange it, or use stock `vllm serve`."
        )
