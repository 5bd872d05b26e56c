"""How many 32k requests decode at once, and how fast: stock vLLM or budget 2,048, 8B shapes, random weights.

python -m benchmarks.gpu.capacity stock|REQUESTS
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

from benchmarks.gpu.engine import build, random_llama, random_prompt, say

PROMPT, OUTPUT, BUDGET = 32768, 128, 2048


def main(requests: int | None) -> None:
    from vllm import SamplingParams

    llm = build(
        random_llama(), compress=requests is not None, load_format="dummy", skip_tokenizer_init=True,
        max_model_len=34000, gpu_memory_utilization=0.9, max_num_batched_tokens=8192, max_num_seqs=256,
    )  # fmt: skip
    cache = llm.llm_engine.vllm_config.cache_config
    fit = requests or cache.num_gpu_blocks * cache.block_size // (PROMPT + OUTPUT + cache.block_size)
    extra: dict[str, Any] = {"kv_cache": {"policy": "snapkv", "budget": BUDGET}}
    engine = llm.llm_engine
    for i in range(fit):
        params = SamplingParams(
            max_tokens=OUTPUT + 4 * fit, temperature=0, ignore_eos=True, detokenize=False,
            extra_args=extra if requests else None,
        )  # fmt: skip
        engine.add_request(f"r{i}", {"prompt_token_ids": random_prompt(PROMPT, i)}, params)
    began = time.perf_counter()
    decoding: dict[str, float] = {}
    steps: list[float] = []
    while len(decoding) < fit or len(steps) < OUTPUT:
        before = time.perf_counter()
        outputs = engine.step()
        if len(decoding) == fit:
            steps.append(time.perf_counter() - before)
        for output in outputs:
            if output.outputs[0].token_ids:
                decoding.setdefault(output.request_id, time.perf_counter() - began)
        if not engine.has_unfinished_requests():
            break
    scheduler = engine.engine_core.engine_core.scheduler
    step = statistics.median(steps[8:])
    say(requests=fit, running=len(scheduler.running), preemptions=sum(r.num_preemptions for r in scheduler.running),
        all_prompts_s=round(max(decoding.values()), 2), decode_step_ms=round(step * 1e3, 2),
        decode_tokens_s=round(fit / step), steps=len(steps))  # fmt: skip
    if requests:
        say(totals=scheduler.compression_totals.by_policy)


if __name__ == "__main__":
    main(None if sys.argv[1] == "stock" else int(sys.argv[1]))
