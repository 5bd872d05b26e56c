"""A whole decode step by selector, against stock vLLM: 8B shapes, random weights.

python -m benchmarks.gpu.selector_steps stock|longreach [--tokens 2048] [--selectors recycled tidal ...]
    [--shapes 32768x1,32768x4,32768x8,126000x1,126000x3]

All selectors get the same prompts, which the prefix cache has after the first of them. A time is the mean of the last
100 steps, two strides of Recycled Attention.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from attention_plugins.decode.registry import DENSE
from benchmarks.gpu.capacity import parse_shape
from benchmarks.gpu.engine import build_8b, random_prompt, say

STEPS, WARM = 100, 20
SELECTORS = ["recycled", "quest", "tidal", "lessismore"]
SHAPES = "32768x1,32768x4,32768x8,126000x1,126000x3"
GRAPHS: dict[str, Any] = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}


def measure(llm: Any, prompts: list[list[int]], words: dict[str, Any] | None) -> tuple[float, dict[str, int]]:
    """Seconds of a step, and how many steps did what."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    extra = {"decode_attention": words} if words else None
    for index, prompt in enumerate(prompts):
        # Prompts end one after the other: the last has to find the others still there.
        most = STEPS + WARM + 4 * len(prompts) + (126_000 // 8192 + 1) * len(prompts)
        params = SamplingParams(max_tokens=most, temperature=0, ignore_eos=True, detokenize=False, extra_args=extra)
        engine.add_request(f"r{index}", {"prompt_token_ids": prompt}, params)
    started: dict[str, int] = {}
    times: list[float] = []
    told: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        before = time.perf_counter()
        outputs = engine.step()
        for output in outputs:
            started[output.request_id] = len(output.outputs[0].token_ids)
            told = (output.kv_transfer_params or {}).get("kv_cache", {}).get("decode_usage") or told
        running = len(started) == len(prompts) and len(outputs) == len(prompts)
        if running:
            times.append(time.perf_counter() - before)
    kept = times[WARM : WARM + STEPS]
    return sum(kept) / len(kept), dict(told.get("steps", {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=["stock", "longreach"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--min-context", type=int, default=0, help="0: selectors work at any length")
    parser.add_argument("--selectors", nargs="+", default=SELECTORS)
    parser.add_argument("--shapes", default=SHAPES, help="PROMPTxBATCH by commas")
    args = parser.parse_args()
    stock = args.system == "stock"
    settings: dict[str, Any] = {} if stock else {"decode": {"selectors": args.selectors, "states": 16}}
    llm = build_8b(stock=stock, fp8=False, max_requests=16, compilation_config=GRAPHS, **settings)
    for length, batch in map(parse_shape, args.shapes.split(",")):
        prompts = [random_prompt(length, 1000 + index) for index in range(batch or 1)]
        measure(llm, prompts, None)
        for name in [DENSE, *([] if stock else args.selectors)]:
            asked = {"selector": name, "tokens": args.tokens, "min_context": args.min_context}
            seconds, steps = measure(llm, prompts, None if name == DENSE else asked)
            say(
                system=args.system, selector=name, prompt=length, batch=len(prompts), tokens=args.tokens,
                ms_a_step=round(seconds * 1e3, 3), steps=steps,
            )  # fmt: skip


if __name__ == "__main__":
    main()
