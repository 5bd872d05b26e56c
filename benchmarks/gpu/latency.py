"""Time to first token and time per output token without a policy, against stock vLLM: what Longreach costs who
doesn't use it.

python -m benchmarks.gpu.latency [--stock] [--fp8] SHAPE ...      (SHAPE: PROMPTxBATCH)
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from benchmarks.gpu.capacity import parse_shape
from benchmarks.gpu.engine import build_8b, random_prompt, say

STEPS, REPEATS = 64, 3


def measure(llm: Any, prompt: int, batch: int, seed: int) -> tuple[float, float]:
    """Seconds until all have their first token, and median seconds of a decode step."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    prompts = [random_prompt(prompt, seed * 1000 + i) for i in range(batch)]
    began = time.perf_counter()
    for i, tokens in enumerate(prompts):
        params = SamplingParams(max_tokens=STEPS + 2 * batch, temperature=0, ignore_eos=True, detokenize=False)
        engine.add_request(f"r{i}", {"prompt_token_ids": tokens}, params)
    started: set[str] = set()
    first, steps = 0.0, []
    while engine.has_unfinished_requests():
        before = time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        if first:
            steps.append(now - before)
        started |= {output.request_id for output in outputs if output.outputs[0].token_ids}
        if len(started) == batch and not first:
            first = now - began
    return first, statistics.median(steps[8 : STEPS - 8])


def report(llm: Any, prompt: int, batch: int) -> None:
    repeats = REPEATS if prompt * batch < 200_000 else 1
    measured = [measure(llm, prompt, batch, repeat) for repeat in range(repeats + 1)][1:]
    ttft, tpot = (statistics.median(values) for values in zip(*measured, strict=True))
    say(prompt=prompt, batch=batch, ttft_s=round(ttft, 4), tpot_ms=round(tpot * 1e3, 3), repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", type=parse_shape)
    parser.add_argument("--stock", action="store_true", help="vLLM as it is")
    parser.add_argument("--fp8", action="store_true", help="an fp8 KV cache")
    args = parser.parse_args()
    llm = build_8b(stock=args.stock, fp8=args.fp8)
    for prompt, batch in args.shapes:
        report(llm, prompt, batch or 1)


if __name__ == "__main__":
    main()
