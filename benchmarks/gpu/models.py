"""Whether models of these shapes start, serve, compress and free, and what a decode step costs against stock vLLM.

Weights are random, and configurations written by this.

python -m benchmarks.gpu.models [--context N] [--requests N] [--budget N] [MODEL ...]

Stock vLLM and ours run one after the other in processes of their own, on the same GPU: at the same true length, each
request of `--budget` tokens (what a compressed request reads), and ours again with prompts of `--context` compressed to
it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.engine import LLAMA_8B, build, random_prompt, say

_COMMON: dict[str, Any] = {"torch_dtype": "bfloat16", "hidden_act": "silu", "rms_norm_eps": 1e-6, "bos_token_id": 1,
                           "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip


def _heads(query: int, kv: int, size: int) -> dict[str, int]:
    return {"num_attention_heads": query, "num_key_value_heads": kv, "head_dim": size}


def _turns(layers: int, every: int) -> list[str]:
    """Every so manyth layer sees everything, the others slide."""
    return ["full_attention" if (index + 1) % every == 0 else "sliding_attention" for index in range(layers)]


MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": LLAMA_8B,
    "qwen3-8b": {
        **_COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096,
        "intermediate_size": 12288, "num_hidden_layers": 36, **_heads(32, 8, 128), "vocab_size": 151936,
        "max_position_embeddings": 40960, "rope_theta": 1000000.0, "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        **_COMMON, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
        "intermediate_size": 6144, "num_hidden_layers": 48, **_heads(32, 4, 128), "vocab_size": 151936,
        "max_position_embeddings": 40960, "rope_theta": 1000000.0, "tie_word_embeddings": False, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1,
    },
    "gemma-3-12b": {
        **_COMMON, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 3840,
        "intermediate_size": 15360, "num_hidden_layers": 48, **_heads(16, 8, 256), "vocab_size": 262208,
        "max_position_embeddings": 131072, "query_pre_attn_scalar": 256, "sliding_window": 1024,
        "layer_types": _turns(48, 6), "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True,
    },
    "gpt-oss-20b": {
        **_COMMON, "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880,
        "intermediate_size": 2880, "num_hidden_layers": 24, **_heads(64, 8, 64), "vocab_size": 201088,
        "max_position_embeddings": 131072, "sliding_window": 128, "layer_types": _turns(24, 2),
        "num_local_experts": 32, "num_experts_per_tok": 4, "attention_bias": True, "tie_word_embeddings": False,
        "swiglu_limit": 7.0, "rope_theta": 150000.0,
        "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                         "original_max_position_embeddings": 4096},
    },
    "mistral-7b": {
        **_COMMON, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, **_heads(32, 8, 128), "vocab_size": 32768,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": None,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
"""`config.json` of models that people run, as their makers publish it."""
STEPS = 64


def write(name: str, layers: int | None = None) -> str:
    """A folder with the configuration, for `load_format="dummy"`; of so many layers, where given."""
    config = dict(MODELS[name])
    if layers:
        config["num_hidden_layers"] = layers
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:layers]
    folder = tempfile.mkdtemp()
    (Path(folder) / "config.json").write_text(json.dumps(config))
    return folder


def build_model(name: str, *, stock: bool, context: int, layers: int | None, memory: dict[str, Any]) -> Any:
    return build(
        write(name, layers), compress=not stock, load_format="dummy", skip_tokenizer_init=True, max_num_seqs=64,
        max_model_len=context + 4 * STEPS, max_num_batched_tokens=8192, **memory,
        compilation_config={"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]},
    )  # fmt: skip


def measure(llm: Any, prompt: int, requests: int, words: dict[str, Any] | None) -> dict[str, Any]:
    """Let requests of one length decode together; what a step took, and what they held."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool, extra = scheduler.kv_cache_manager.block_pool, {"kv_cache": words} if words else None
    free, usage = pool.get_num_free_blocks(), None
    steps: list[float] = []
    started: set[str] = set()
    for index in range(requests):
        params = SamplingParams(
            max_tokens=2 * STEPS + 2 * requests, temperature=0, ignore_eos=True, detokenize=False, extra_args=extra
        )
        tokens = [token % 30000 for token in random_prompt(prompt, index)]
        engine.add_request(f"r{index}", {"prompt_token_ids": tokens}, params)
    held, running = 0, requests
    while engine.has_unfinished_requests():
        before = time.perf_counter()
        outputs = engine.step()
        if len(started) == requests and len(steps) < STEPS + 16:
            steps.append(time.perf_counter() - before)
            held = free - pool.get_num_free_blocks()
            running = min(running, len(scheduler.running))
        for output in outputs:
            if output.outputs[0].token_ids:
                started.add(output.request_id)
            if output.finished and words:
                usage = output.kv_transfer_params["kv_cache"]["usage"]
    scheduler.reset_prefix_cache()
    return {
        "prompt": prompt, "requests": requests, "policy": (words or {}).get("policy"),
        "decode_step_ms": round(statistics.median(steps[16:]) * 1e3, 3), "blocks_held": held,
        "running": running, "leaked": free - pool.get_num_free_blocks(), "usage": usage,
    }  # fmt: skip


def child(name: str, args: argparse.Namespace) -> None:
    """One engine, in a process of its own: its rows."""
    stock, context, requests, budget = args.engine == "stock", args.context, args.requests, args.budget
    memory = {"gpu_memory_utilization": args.gpu_memory_utilization}
    if args.kv_cache_memory_bytes:
        memory["kv_cache_memory_bytes"] = args.kv_cache_memory_bytes
    llm = build_model(name, stock=stock, context=context, layers=args.layers, memory=memory)
    kind = {"model": name, "layers": args.layers, "engine": "stock" if stock else "longreach"}
    measure(llm, budget, 1, None)  # warms up
    say(**kind, **measure(llm, budget, requests, None))
    if not stock:
        words = {"policy": "snapkv", "budget": budget}
        row = measure(llm, context, requests, words)
        row["block_bytes"] = llm.llm_engine.engine_core.engine_core.scheduler.block_bytes
        say(**kind, **row)


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is asked of a model: compressed steps within 10 % of stock's at the same true length, memory freed. It holds
    only where all requests ran together."""
    stock, whole, small = rows
    size, usage = small["block_bytes"], small["usage"]
    return {
        "model": stock["model"],
        "layers": stock.get("layers"),
        "stock_ms": stock["decode_step_ms"],
        "none_ratio": round(whole["decode_step_ms"] / stock["decode_step_ms"], 3),
        "compressed_ratio": round(small["decode_step_ms"] / stock["decode_step_ms"], 3),
        "within_10_percent": small["decode_step_ms"] <= 1.1 * stock["decode_step_ms"],
        "all_running": all(row["running"] == row["requests"] for row in rows),
        "kept_tokens": usage["kept_tokens"]["mean"],
        "freed_share": round(usage["bytes_freed"] / (usage["bytes_freed"] + usage["bytes_held"]), 3),
        "blocks_of_a_request": (usage["bytes_held"] + usage.get("other_layers", {}).get("bytes_held", 0)) // size,
        "blocks_held_each": round(small["blocks_held"] / small["requests"], 2),
        "leaked": small["leaked"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--context", type=int, default=16384, help="tokens of a prompt that is compressed (16384)")
    parser.add_argument("--requests", type=int, default=8, help="that decode together (8)")
    parser.add_argument("--budget", type=int, default=2048, help="tokens that stay of it (2048)")
    parser.add_argument("--layers", type=int, help="fewer than the model has, where two engines are to share a GPU")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--kv-cache-memory-bytes", type=int, help="where engines share a GPU")
    parser.add_argument("--engine", choices=["stock", "longreach"], help="of one process; both in turn without")
    args = parser.parse_args()
    if unknown := set(args.models) - set(MODELS):
        parser.error(f"no such model: {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    sizes = ["--context", str(args.context), "--requests", str(args.requests), "--budget", str(args.budget),
             "--gpu-memory-utilization", str(args.gpu_memory_utilization)]  # fmt: skip
    if args.layers:
        sizes += ["--layers", str(args.layers)]
    if args.kv_cache_memory_bytes:
        sizes += ["--kv-cache-memory-bytes", str(args.kv_cache_memory_bytes)]
    for name in args.models or MODELS:
        if args.engine:
            child(name, args)
            continue
        rows: list[dict[str, Any]] = []
        for engine in ("stock", "longreach"):
            command = [sys.executable, "-m", "benchmarks.gpu.models", name, "--engine", engine, *sizes]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            print(done.stdout, end="", flush=True)
            told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            rows += [row for row in told if "decode_step_ms" in row]
        if len(rows) == 3:
            say(**verdict(rows))
        else:
            say(model=name, failed=True)


if __name__ == "__main__":
    main()
