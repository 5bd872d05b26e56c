"""Compression on CUDA answers rightly: passkeys on the real model, and what is kept is what the CPU path keeps.

python -m benchmarks.gpu.passkeys MODEL_FOLDER [--documents 32] [--tensor-parallel 1] [--kv-heads 4] [--fp8]

The embedded model's 3 KV heads don't divide by 2: with --kv-heads 4 it gets one more whose weights are zero, which
changes no answer (`pad_heads`).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.engine import build, say
from benchmarks.gpu.pad_heads import pad_heads
from kvcache.compressor import Compressor
from kvcache.evidence import LayerEvidence
from kvcache.orders import Compact
from kvcache.selection import force, keep_top

POLICIES: list[dict[str, Any]] = [
    {"policy": "none"},
    {"policy": "snapkv", "budget": 512},
    {"policy": "pyramidkv", "budget": 512},
    {"policy": "zigzagkv", "budget": 512},
    {"policy": "adakv", "budget": 512},
    {"policy": "criticalkv", "budget": 512},
    {"policy": "streamingllm", "budget": 512},
]
CHECKED = ("snapkv", "pyramidkv")
"""Policies whose kept sets are compared, two prompts of each length."""


class KeptCheck:
    """Runs the CPU path's code on what the GPU had in its cache, and compares the kept positions.

    A position that only one of them keeps is a tie if its score is within 1e-5 (relative) of the last one kept.
    """

    def __init__(self, compressor: Compressor) -> None:
        self.compressor, self.left = compressor, 0
        self.prompts = self.positions = self.ties = self.wrong = 0
        self._compact = compressor.compact
        compressor.compact = self.compact  # type: ignore[method-assign]

    def compact(self, order: Compact) -> Any:
        request = self.compressor.requests[order.request_id]
        prompt_blocks = torch.tensor(order.source_blocks, device=self.compressor.pages.device)
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


def install_check(worker: Any) -> None:
    """On every GPU's worker, as are the two below."""
    worker.worker.kept_check = KeptCheck(worker.worker.runtime.compressor)


def check_next(worker: Any, prompts: int) -> None:
    worker.worker.kept_check.left = prompts


def checked(worker: Any) -> dict[str, int]:
    check = worker.worker.kept_check
    return {name: getattr(check, name) for name in ("prompts", "positions", "ties", "wrong")}


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
    parser.add_argument("--kv-heads", type=int, help="pad the model to so many")
    parser.add_argument("--policies", help="some of them, separated by commas")
    parser.add_argument("--fp8", action="store_true")
    args = parser.parse_args()
    model = args.model
    if args.kv_heads:
        model = pad_heads(Path(model), Path(tempfile.mkdtemp()), args.kv_heads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    llm = build(
        str(model), max_model_len=8192, gpu_memory_utilization=0.3, max_num_batched_tokens=4096, keep_positions=True,
        tensor_parallel_size=args.tensor_parallel, kv_cache_dtype="fp8" if args.fp8 else "auto",
        kv_cache_memory_bytes=8 << 30, max_num_seqs=args.documents,
    )  # fmt: skip
    llm.llm_engine.collective_rpc(install_check)
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
            if args.policies and words["policy"] not in args.policies.split(","):
                continue
            llm.llm_engine.collective_rpc(check_next, args=(2 if words["policy"] in CHECKED else 0,))
            outputs = run(llm, prompts, words, 24)
            missed = [
                i for i, (case, output) in enumerate(zip(suite, outputs, strict=True))
                if case.answer not in output.outputs[0].text
            ]  # fmt: skip
            usage = outputs[0].kv_transfer_params["kv_cache"]
            say(tokens=length, policy=words["policy"], found=len(suite) - len(missed), of=len(suite), missed=missed,
                kept=usage["usage"]["kept_tokens"], totals=usage["totals"].get(words["policy"]))  # fmt: skip
    say(kept_sets_compared_with_cpu_by_gpu=llm.llm_engine.collective_rpc(checked))
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    say(blocks_leaked=pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())


if __name__ == "__main__":
    main()
