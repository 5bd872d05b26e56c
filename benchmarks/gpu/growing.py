"""Long answers inside a budget: memory stays flat; what compacting answers costs.

python -m benchmarks.gpu.growing MODEL_FOLDER [--requests 16] [--prompt 1000] [--output 7000] [--policies ...]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmarks.gpu.engine import build, random_prompt, say

BUDGET, INTERVAL = 1024, 128
POLICIES = ["none", "streamingllm", "tova", "rkv", "h2o", "raas", "lra", "lfa"]


def measure(llm: Any, policy: str, requests: int, prompt: int, output: int) -> None:
    """All requests at once; the most blocks they held, and the time of a step."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    words = {"policy": policy} if policy == "none" else {"policy": policy, "budget": BUDGET, "interval": INTERVAL}
    params = SamplingParams(
        max_tokens=output, temperature=0, ignore_eos=True, detokenize=False, extra_args={"kv_cache": words}
    )
    for i in range(requests):
        # Some tokens apart, so that their compactions don't fall into the same steps.
        tokens = random_prompt(prompt + i * INTERVAL // requests, i)
        engine.add_request(f"{policy}-{i}", {"prompt_token_ids": [token % 40000 for token in tokens]}, params)
    held, steps, usage = [], [], None
    while engine.has_unfinished_requests():
        before = time.perf_counter()
        outputs = engine.step()
        steps.append(time.perf_counter() - before)
        held.append(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        for one in outputs:
            usage = (one.kv_transfer_params or {}).get("kv_cache", {}).get("usage") or usage
    late = held[len(held) // 3 : -INTERVAL]
    totals = scheduler.compression_totals.by_policy.get(policy, {})
    say(policy=policy, requests=requests, prompt=prompt, output=output, seconds=round(sum(steps), 2),
        ms_a_step=round(1e3 * sum(steps) / len(steps), 3), most_blocks_late=max(late), least_blocks_late=min(late),
        block_tokens=scheduler.kv_blocks.block_size, compactions=totals.get("compactions"),
        compaction_ms=round(1e3 * totals["seconds"] / totals["compactions"], 2) if totals else None,
        compacted_tokens=(usage or {}).get("compacted_tokens"), bytes_held=(usage or {}).get("bytes_held"),
        blocks_leaked=pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=1000)
    parser.add_argument("--output", type=int, default=7000)
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    args = parser.parse_args()
    llm = build(
        args.model, max_model_len=8192, max_num_batched_tokens=4096, max_num_seqs=64, kv_cache_memory_bytes=8 << 30
    )
    for policy in args.policies:
        measure(llm, policy, args.requests, args.prompt, args.output)


if __name__ == "__main__":
    main()
