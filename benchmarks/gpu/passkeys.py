"""Compression on CUDA answers rightly: passkeys on the real model, and equality with transformers.

python -m benchmarks.gpu.passkeys MODEL_FOLDER DOCUMENTS
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.gpu.engine import build, say

POLICIES: list[dict[str, Any]] = [
    {"policy": "none"},
    {"policy": "snapkv", "budget": 512},
    {"policy": "pyramidkv", "budget": 512},
    {"policy": "streamingllm", "budget": 512},
]


def run(llm: Any, prompts: list[list[int]], words: dict[str, Any], tokens: int) -> tuple[list[Any], dict[str, Any]]:
    """All prompts at once; their outputs and, by external id, the kept positions."""
    from vllm import SamplingParams

    engine, kept = llm.llm_engine, {}
    compressor = engine.engine_core.engine_core.model_executor.driver_worker.worker.runtime.compressor
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, extra_args={"kv_cache": words})
        engine.add_request(f"r{i}", {"prompt_token_ids": prompt}, params)
    outputs: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[output.request_id] = output
        for name, request in compressor.requests.items():
            if request.kept:
                kept[name.rpartition("-")[0]] = [[head.cpu() for head in layer] for layer in request.kept]
    return [outputs[f"r{i}"] for i in range(len(prompts))], kept


def main(model: str, documents: int) -> None:
    from transformers import AutoTokenizer

    from benchmarks.quality.passkeys import make_suite
    from tests.reference import Reference

    tokenizer = AutoTokenizer.from_pretrained(model)
    llm = build(model, max_model_len=8192, gpu_memory_utilization=0.5, keep_positions=True, max_num_batched_tokens=4096)
    for length in (2500, 4900, 7300):
        suite = make_suite(tokenizer, tokens=length, documents=documents, columns=8, seed=0)
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": f"{case.document}\n\n{case.question}"}],
                add_generation_prompt=True, return_dict=False,
            )
            for case in suite
        ]  # fmt: skip
        for words in POLICIES:
            outputs, _ = run(llm, prompts, words, 24)
            found = sum(case.answer in output.outputs[0].text for case, output in zip(suite, outputs, strict=True))
            usage = outputs[0].kv_transfer_params["kv_cache"]
            say(tokens=length, policy=words["policy"], found=found, of=len(suite),
                kept=usage["usage"]["kept_tokens"], totals=usage["totals"].get(words["policy"]))  # fmt: skip
        if length == 2500:
            reference = Reference(model)
            for words in POLICIES[1:]:
                outputs, kept = run(llm, prompts[:2], words, 12)
                for i, output in enumerate(outputs):
                    page = llm.llm_engine.vllm_config.cache_config.block_size
                    tokens, _ = reference.greedy(prompts[i], 12, kept[f"r{i}"], len(prompts[i]) // page * page)
                    same = list(output.outputs[0].token_ids) == tokens
                    say(policy=words["policy"], document=i, equals_transformers_float32=same,
                        ours=output.outputs[0].text, theirs=tokenizer.decode(tokens))  # fmt: skip
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    say(blocks_leaked=pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
