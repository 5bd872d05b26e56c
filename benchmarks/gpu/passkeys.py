"""Compression on CUDA answers rightly: passkeys on the real model, and what is kept is what the CPU path keeps.

python -m benchmarks.gpu.passkeys MODEL_FOLDER [--documents 32] [--tensor-parallel 1] [--fp8]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.gpu.engine import build, say
from kvcache.compressor import Compact, Compressor
from kvcache.evidence import LayerEvidence
from kvcache.selection import force, keep_top

POLICIES: list[dict[str, Any]] = [
    {"policy": "none"},
    {"policy": "snapkv", "budget": 512},
    {"policy": "pyramidkv", "budget": 512},
    {"policy": "streamingllm", "budget": 512},
]


class KeptCheck:
    """Runs the CPU path's code on what the GPU had in its cache, and compares the kept positions.

    A position that only one of them keeps is a tie if its score is within 1e-5 (relative) of the last one kept.
    """

    def __init__(self, compressor: Compressor, most: int) -> None:
        self.compressor, self.left = compressor, most
        self.prompts = self.positions = self.ties = self.wrong = 0
        self._compact = compressor.compact
        compressor.compact = self.compact  # type: ignore[method-assign]

    def compact(self, order: Compact) -> Any:
        request = self.compressor.requests[order.request_id]
        prompt_blocks = torch.tensor(order.source_blocks, device="cuda")
        evidence = []
        if self.left > 0:
            for layer in range(self.compressor.geometry.num_layers):
                observed = {observer.name: observer.found(layer) for observer in request.observers}
                pages = self.compressor.geometry.pages_of(layer, prompt_blocks)
                paged = self.compressor.evidence(layer, pages, request.plan.prompt_len, observed)
                window = paged.window_queries
                parts = (paged.keys.cpu(), paged.values.cpu(), window.cpu() if window is not None else None)
                evidence.append(LayerEvidence(layer, *parts, paged.scale))
        pending = self._compact(order)
        if evidence:
            self.left -= 1
            self.prompts += 1
            for on_cpu, kept in zip(evidence, self.compressor.kept_positions(order.request_id), strict=True):
                self._compare(request, on_cpu, [head.cpu() for head in kept])
        return pending

    def _compare(self, request: Any, evidence: LayerEvidence, kept: list[torch.Tensor]) -> None:
        plan, policy = request.plan, request.policy
        scores = policy.scores(evidence)[:, : plan.full_pages * plan.page_size]
        scores = force(scores, policy.args.sinks, max(0, policy.recent - plan.tail))
        theirs = keep_top(scores, torch.tensor([len(head) for head in kept]))
        for row, mine, wanted in zip(scores, kept, theirs, strict=True):
            wanted = wanted[: len(mine)]
            self.positions += len(mine)
            threshold = row[wanted].min()
            for position in set(mine.tolist()) ^ set(wanted.tolist()):
                near = abs(float(row[position] - threshold)) <= 1e-5 * abs(float(threshold))
                self.ties, self.wrong = self.ties + near, self.wrong + (not near)


def run(llm: Any, prompts: list[list[int]], words: dict[str, Any], tokens: int) -> list[Any]:
    """All prompts at once."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, extra_args={"kv_cache": words})
        engine.add_request(f"r{i}", {"prompt_token_ids": prompt}, params)
    outputs: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[output.request_id] = output
    return [outputs[f"r{i}"] for i in range(len(prompts))]


def main() -> None:
    from transformers import AutoTokenizer

    from benchmarks.quality.passkeys import make_suite

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--fp8", action="store_true")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    alone = args.tensor_parallel == 1
    llm = build(
        args.model, max_model_len=8192, gpu_memory_utilization=0.5, max_num_batched_tokens=4096,
        keep_positions=alone, tensor_parallel_size=args.tensor_parallel,
        kv_cache_dtype="fp8" if args.fp8 else "auto",
    )  # fmt: skip
    check = None
    if alone:  # with several GPUs the workers are processes of their own
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        check = KeptCheck(worker.runtime.compressor, 0)
    for length in (2500, 4900, 7300):
        suite = make_suite(tokenizer, tokens=length, documents=args.documents, columns=8, seed=0)
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": f"{case.document}\n\n{case.question}"}],
                add_generation_prompt=True, return_dict=False,
            )
            for case in suite
        ]  # fmt: skip
        for words in POLICIES:
            if check:
                check.left = 2 if words["policy"] in ("snapkv", "pyramidkv") else 0
            outputs = run(llm, prompts, words, 24)
            found = sum(case.answer in output.outputs[0].text for case, output in zip(suite, outputs, strict=True))
            usage = outputs[0].kv_transfer_params["kv_cache"]
            say(tokens=length, policy=words["policy"], found=found, of=len(suite),
                kept=usage["usage"]["kept_tokens"], totals=usage["totals"].get(words["policy"]))  # fmt: skip
    if check:
        say(kept_sets_compared_with_cpu=check.prompts, positions=check.positions, ties=check.ties, wrong=check.wrong)
    if alone:
        pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        say(blocks_leaked=pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())


if __name__ == "__main__":
    main()
