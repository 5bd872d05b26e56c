"""How many long requests decode at once, and how fast: stock vLLM or a budget, 8B shapes, random weights.

python -m benchmarks.gpu.capacity [--stock] [--fp8] [--policy NAME] [--same] [--tensor-parallel N]
    [--max-requests N] SHAPE [SHAPE ...]

A SHAPE is PROMPTxREQUESTS, or PROMPT alone for as many requests as fit without compression. With --same all requests
of a shape have one prompt, which the prefix cache makes quick; a decode step costs the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from benchmarks.gpu.engine import build_8b, random_prompt, say

OUTPUT, BUDGET = 128, 2048


def measure(llm: Any, prompt: int, requests: int | None, words: dict[str, Any] | None, same: bool) -> None:
    """Fill the engine with requests; when all decode, time the steps."""
    from vllm import SamplingParams

    engine, cache = llm.llm_engine, llm.llm_engine.vllm_config.cache_config
    requests = requests or cache.num_gpu_blocks * cache.block_size // (prompt + OUTPUT + cache.block_size)
    extra = {"kv_cache": words} if words and prompt > BUDGET else None
    for i in range(requests):
        params = SamplingParams(
            max_tokens=OUTPUT + 4 * requests, temperature=0, ignore_eos=True, detokenize=False, extra_args=extra
        )
        engine.add_request(f"r{i}", {"prompt_token_ids": random_prompt(prompt, 0 if same else i)}, params)
    began = time.perf_counter()
    decoding: dict[str, float] = {}
    steps: list[float] = []
    while len(decoding) < requests or len(steps) < OUTPUT:
        before = time.perf_counter()
        outputs = engine.step()
        if len(decoding) == requests:
            steps.append(time.perf_counter() - before)
        for output in outputs:
            if output.outputs[0].token_ids:
                decoding.setdefault(output.request_id, time.perf_counter() - began)
        if not engine.has_unfinished_requests():
            break
    scheduler = engine.engine_core.engine_core.scheduler
    step = statistics.median(steps[8:])
    say(prompt=prompt, requests=requests, policy=(words or {}).get("policy"), same_prompt=same,
        running=len(scheduler.running), preemptions=sum(r.num_preemptions for r in scheduler.running),
        all_prompts_s=round(max(decoding.values()), 2), decode_step_ms=round(step * 1e3, 2),
        decode_tokens_s=round(requests / step), steps=len(steps))  # fmt: skip
    if words:
        say(totals=scheduler.compression_totals.by_policy)
    engine.abort_request([f"r{i}" for i in range(requests)])
    while engine.has_unfinished_requests():
        engine.step()
    pool = scheduler.kv_cache_manager.block_pool
    say(blocks_leaked=pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())


def parse_shape(text: str) -> tuple[int, int | None]:
    prompt, _, requests = text.partition("x")
    return int(prompt), int(requests) if requests else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", type=parse_shape)
    parser.add_argument("--stock", action="store_true", help="vLLM as it is")
    parser.add_argument("--fp8", action="store_true", help="an fp8 KV cache")
    parser.add_argument("--same", action="store_true")
    parser.add_argument("--policy", default="snapkv")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs")
    parser.add_argument("--max-requests", type=int, default=256, help="vLLM's max_num_seqs")
    args = parser.parse_args()
    llm = build_8b(
        stock=args.stock, fp8=args.fp8, tensor_parallel=args.tensor_parallel, max_requests=args.max_requests
    )  # fmt: skip
    words = None if args.stock else {"policy": args.policy, "budget": BUDGET}
    for prompt, requests in args.shapes:
        measure(llm, prompt, requests, words, args.same)


if __name__ == "__main__":
    main()
