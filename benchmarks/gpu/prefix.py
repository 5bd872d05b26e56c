"""A common prefix of 16k tokens and 100 requests: the prefix cache serves compressed requests as it serves stock's.

python -m benchmarks.gpu.prefix [--stock] [--fp8]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmarks.gpu.engine import build_8b, random_prompt, say

PREFIX, SUFFIX, REQUESTS = 16384, 512, 100


def measure(llm: Any, words: dict[str, Any] | None, seed: int) -> None:
    """The first request alone, so that the others find its blocks; then all others at once."""
    from vllm import SamplingParams

    engine, prefix = llm.llm_engine, random_prompt(PREFIX, seed)
    extra = {"kv_cache": words} if words else None
    params = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True, detokenize=False, extra_args=extra)
    hits, began = [], time.perf_counter()
    for group in ([0], range(1, REQUESTS)):
        for i in group:
            prompt = prefix + random_prompt(SUFFIX, seed + 1 + i)
            engine.add_request(f"r{i}", {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            hits += [output.num_cached_tokens for output in engine.step() if output.finished]
    say(policy=(words or {}).get("policy"), prefix=PREFIX, requests=REQUESTS, cached_tokens=sum(hits),
        seconds=round(time.perf_counter() - began, 2))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stock", action="store_true", help="vLLM as it is")
    parser.add_argument("--fp8", action="store_true", help="an fp8 KV cache")
    args = parser.parse_args()
    llm = build_8b(stock=args.stock, fp8=args.fp8)
    measure(llm, None, 1)
    if not args.stock:
        measure(llm, {"policy": "snapkv", "budget": 2048}, 1_000_000)


if __name__ == "__main__":
    main()
