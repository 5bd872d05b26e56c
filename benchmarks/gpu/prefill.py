"""Time to first token with sparse prefill, against stock vLLM: 8B shapes, random weights.

python -m benchmarks.gpu.prefill stock|longreach [--shapes 32768x1,65536x1,126000x1,65536x4] [--patterns LABEL ...]
    [--together] [--fp8]

Random weights attend to everything alike, so real arguments would say nothing: these are set to compute some 5 or 10 %
of the attention, estimation included; rows say how much it was. `--together` measures one prompt with a policy and a
selector too: each alone, and all three.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.capacity import parse_shape
from benchmarks.gpu.engine import build_8b, random_prompt, say

SHAPES = "32768x1,65536x1,126000x1,65536x4"
GRAPHS: dict[str, Any] = {"cudagraph_capture_sizes": [1, 2, 4, 8]}
DENSE = "dense"
Make = Callable[[int], dict[str, Any]]
"""The words of a pattern for prompts of so many tokens."""


def _streaming(share: float) -> Make:
    """A window that holds this share of the whole prompt's causal pairs."""
    return lambda n: {"pattern": "streaming", "sinks": 128, "window": max(256, round(share * n / 2) - 128)}


PATTERNS: dict[str, Make] = {
    DENSE: lambda n: {"pattern": DENSE},
    "streaming 5 %": _streaming(0.05),
    "streaming 10 %": _streaming(0.1),
    "streaming 5 % + delta": lambda n: {
        "pattern": "delta", "gamma": 64, "base": {**_streaming(0.05)(n), "min_context": 0},
    },
    "flexprefill 5 %": lambda n: {"pattern": "flexprefill", "gamma": 0.025, "tau": 0.0, "min_budget": 128},
    "flexprefill 10 %": lambda n: {"pattern": "flexprefill", "gamma": 0.05, "tau": 0.0, "min_budget": 128},
    "flexprefill 5 % + tail": lambda n: {
        "pattern": "flexprefill", "gamma": 0.025, "tau": 0.0, "min_budget": 128, "dense_last": 128,
    },
    "xattention 5 %": lambda n: {"pattern": "xattention", "stride": 16, "threshold": 0.05},
    "xattention 10 %": lambda n: {"pattern": "xattention", "stride": 16, "threshold": 0.1},
    "xattention 10 %, stride 8": lambda n: {"pattern": "xattention", "stride": 8, "threshold": 0.1},
    "minference 5 %": lambda n: {"pattern": "minference", "vertical": round(0.01 * n), "slash": round(0.02 * n)},
    "anchor": lambda n: {"pattern": "anchor", "theta": -1.0},
    "hip": lambda n: {"pattern": "hip"},
    "zipvl": lambda n: {"pattern": "zipvl", "tau": 0.05},
}  # fmt: skip


BATCHED = DENSE, "streaming 10 %", "flexprefill 10 %", "xattention 10 %"
"""Of the patterns, those that batches are measured with."""


def words_for(label: str, length: int) -> dict[str, Any]:
    words = PATTERNS[label](length)
    return words if words["pattern"] in ("delta", DENSE) else {"min_context": 0, **words}


def first_tokens(llm: Any, prompts: list[list[int]], fields: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Seconds until all have their first token, and what the last of them is told."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    began = time.perf_counter()
    for index, prompt in enumerate(prompts):
        params = SamplingParams(
            max_tokens=2 * len(prompts), temperature=0, ignore_eos=True, detokenize=False, extra_args=fields or None
        )
        engine.add_request(f"r{index}", {"prompt_token_ids": prompt}, params)
    started: set[str] = set()
    first = 0.0
    told: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        outputs = engine.step()
        started |= {output.request_id for output in outputs if output.outputs[0].token_ids}
        if len(started) == len(prompts) and not first:
            first = time.perf_counter() - began
        for output in outputs:
            told = (output.kv_transfer_params or {}).get("kv_cache", {}) or told
    return first, told


def decode_step(llm: Any, prompt: list[int], fields: dict[str, Any]) -> tuple[float, float]:
    """Seconds to the first token, and of a decode step, the mean of 100."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    params = SamplingParams(max_tokens=140, temperature=0, ignore_eos=True, detokenize=False, extra_args=fields or None)
    began = time.perf_counter()
    engine.add_request("one", {"prompt_token_ids": prompt}, params)
    first, times = 0.0, []
    while engine.has_unfinished_requests():
        before = time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        if first:
            times.append(now - before)
        elif any(output.outputs[0].token_ids for output in outputs):
            first = now - began
    return first, statistics.fmean(times[20:120])


def together(llm: Any, stock: bool, length: int) -> None:
    """One prompt with each of the three, and with all."""
    pattern = {"prefill_attention": words_for("flexprefill 10 %", length)}
    policy = {"kv_cache": {"policy": "snapkv", "budget": 8192}}
    selector = {"decode_attention": {"selector": "recycled", "tokens": 1024, "min_context": 0}}
    ways = {DENSE: {}, "pattern": pattern, "policy": policy, "selector": selector,
            "pattern + policy": {**pattern, **policy}, "all three": {**pattern, **policy, **selector}}  # fmt: skip
    for name, fields in ways.items():
        if stock and fields:
            continue
        decode_step(llm, random_prompt(length, 1), fields)
        ttft, step = decode_step(llm, random_prompt(length, 2), fields)
        say(together=name, prompt=length, ttft_s=round(ttft, 3), ms_a_step=round(step * 1e3, 3), stock=stock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=["stock", "longreach"])
    parser.add_argument("--shapes", default=SHAPES, help="PROMPTxBATCH by commas")
    parser.add_argument("--patterns", nargs="+", choices=list(PATTERNS), metavar="LABEL", default=list(PATTERNS))
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--fp8", action="store_true", help="an fp8 KV cache")
    parser.add_argument("--batched", nargs="+", choices=list(PATTERNS), metavar="LABEL", default=list(BATCHED))
    parser.add_argument("--kv-cache-memory-bytes", type=int, help="where engines share a GPU")
    args = parser.parse_args()
    stock = args.system == "stock"
    settings: dict[str, Any] = {} if stock else {"decode": {"selectors": ["recycled"], "states": 16}}
    if args.kv_cache_memory_bytes:
        settings |= {"kv_cache_memory_bytes": args.kv_cache_memory_bytes, "gpu_memory_utilization": 0.1}
    llm = build_8b(
        stock=stock, fp8=args.fp8, max_requests=16, chunk=args.chunk, compilation_config=GRAPHS,
        enable_prefix_caching=False, **settings,
    )  # fmt: skip
    import torch

    for length, batch in map(parse_shape, args.shapes.split(",")):
        repeats = 3 if length * (batch or 1) < 70_000 else 2
        chosen = args.batched if batch and batch > 1 else args.patterns
        for label in [DENSE] if stock else chosen:
            fields = {} if label == DENSE else {"prefill_attention": words_for(label, length)}
            torch.cuda.reset_peak_memory_stats()
            times: list[float] = []
            told: dict[str, Any] = {}
            for repeat in range(repeats):
                prompts = [random_prompt(length, 1000 * repeat + index) for index in range(batch or 1)]
                seconds, told = first_tokens(llm, prompts, fields)
                times.append(seconds)
            usage = told.get("prefill_usage", {})
            say(
                system=args.system, pattern=label, words=fields.get("prefill_attention"), prompt=length,
                batch=batch or 1, ttft_s=round(min(times[1:]), 4), times=[round(value, 3) for value in times],
                density=round(usage.get("density", {}).get("mean", 1.0), 4), chunk=args.chunk,
                peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2),
            )  # fmt: skip
    if args.together:
        together(llm, stock, 126_000)


if __name__ == "__main__":
    main()
