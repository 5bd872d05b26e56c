"""An engine with our CUDA classes in this process, and prompts for it."""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# As `vllm serve` does. With several GPUs the workers are processes: forked ones hang where torch's threads were used.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 128000,
    "eos_token_id": 128001, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
"""Llama-3.1-8B's shapes; served with random weights, since speed doesn't depend on them."""

FEW_GRAPHS: dict[str, Any] = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 96, 128, 256]}
"""`compilation_config` for scripts that time nothing: capturing every size is a good part of a start."""


def random_llama() -> str:
    """Folder with the 8B configuration, for `load_format="dummy"`."""
    folder = tempfile.mkdtemp()
    (Path(folder) / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


def random_model(head_size: int) -> str:
    """Folder with a small Llama whose random weights are large enough for answers to depend on everything."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=512, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=2, head_dim=head_size, max_position_embeddings=8192, initializer_range=0.1,
        tie_word_embeddings=False, dtype=torch.bfloat16, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tempfile.mkdtemp()
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def build(model: str, *, compress: bool = True, **settings: Any) -> Any:
    """vLLM's `LLM`, with our worker, scheduler and attention backend or as it is."""
    from vllm import LLM

    if compress:
        from attention_plugins.vllm_adapter import cuda_backend

        cuda_backend.register()
        settings |= {
            "worker_cls": "attention_plugins.vllm_adapter.cuda_worker.CUDACompressionWorker",
            "scheduler_cls": "kvcache.vllm_adapter.scheduler.AsyncCompressionScheduler",
            "attention_backend": "CUSTOM",
            "additional_config": {
                "longreach": {
                    "keep_positions": settings.pop("keep_positions", False),
                    "decode": settings.pop("decode", {}),
                    "audit": settings.pop("audit", 0),
                }
            },
        }
    began = time.perf_counter()
    llm = LLM(model=model, **settings)
    config = llm.llm_engine.vllm_config
    say(
        start_s=round(time.perf_counter() - began, 1), compress=compress,
        async_scheduling=config.scheduler_config.async_scheduling, v2_runner=config.use_v2_model_runner,
        graphs=str(config.compilation_config.cudagraph_mode), block_size=config.cache_config.block_size,
        kv_tokens=config.cache_config.num_gpu_blocks * config.cache_config.block_size,
    )  # fmt: skip
    return llm


def build_8b(
    *, stock: bool, fp8: bool, tensor_parallel: int = 1, max_requests: int = 256, chunk: int = 8192, **settings: Any
) -> Any:
    """8B shapes with random weights, at most of an 80 GB GPU's memory. At most `max_requests` run at once, and `chunk`
    tokens in a step."""
    return build(
        random_llama(), compress=not stock, load_format="dummy", skip_tokenizer_init=True, max_model_len=131072,
        max_num_batched_tokens=chunk, max_num_seqs=max_requests, kv_cache_dtype="fp8" if fp8 else "auto",
        tensor_parallel_size=tensor_parallel, **{"gpu_memory_utilization": 0.9, **settings},
    )  # fmt: skip


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def random_prompt(tokens: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1000, 100000) for _ in range(tokens)]
