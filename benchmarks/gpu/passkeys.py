"""Compression on CUDA answers rightly: passkeys on the real model, and what is kept is what the CPU path keeps.

python -m benchmarks.gpu.passkeys MODEL_FOLDER [--policies snapkv:512,window=16,kernel=13 ...] [--lengths 2500,7300]
    [--seeds 0,1,2] [--documents 32] [--no-kept-sets] [--kv-gib 8] [--tensor-parallel 1] [--kv-heads 4] [--fp8]

Every document runs without a policy first, which fills the prefix cache for the others (--kv-gib: it should hold all
documents of one length); a document counts only where that run finds its key. One row for each policy and length, as
soon as it is known.

The embedded model's 3 KV heads don't divide by 2: with --kv-heads 4 it gets one more whose weights are zero, which
changes no answer (`pad_heads`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.engine import FEW_GRAPHS, build, say
from benchmarks.gpu.pad_heads import pad_heads
from benchmarks.quality.expect import Policy, parse_policy
from benchmarks.quality.passkeys import make_suite
from kvcache.compressor import Compressor
from kvcache.evidence import LayerEvidence
from kvcache.orders import Compact
from kvcache.registry import make_policy
from kvcache.selection import force, keep_top

DENSE = "none"
POLICIES = [
    DENSE, "snapkv:512", "pyramidkv:512", "zigzagkv:512", "adakv:512", "criticalkv:512", "streamingllm:512",
]  # fmt: skip
CHECKED = ("snapkv", "pyramidkv")
"""Policies whose kept sets are compared, two prompts of each length."""
Place = tuple[int, int]
"""A document: its seed, and its number there."""


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


def parse_policies(texts: Sequence[str]) -> list[Policy]:
    """Dense first, since the others are compared with it; each can be made, so that none fails after an engine's start.

    Raises:
        ValueError: one is malformed, unknown, or given twice.
    """
    policies = [parse_policy(text) for text in dict.fromkeys([DENSE, *texts])]
    for policy in policies:
        make_policy(policy.body.get("kv_cache", {}))
    return policies


def tally(found: Mapping[Place, bool], dense: Mapping[Place, bool]) -> dict[str, Any]:
    """Hits among the documents that dense finds: what a small model can't do is no policy's fault."""
    counted = [place for place, hit in dense.items() if hit]
    by_seed: dict[int, list[int]] = {}
    for place in counted:
        hits = by_seed.setdefault(place[0], [0, 0])
        hits[0], hits[1] = hits[0] + found[place], hits[1] + 1
    return {
        "documents": len(dense),
        "dense": len(counted),
        "found": sum(found[place] for place in counted),
        "found_of_dense_by_seed": by_seed,
        "missed": [place for place in counted if not found[place]],
    }


def measure(llm: Any, tokenizer: Any, length: int, policies: Sequence[Policy], args: argparse.Namespace) -> None:
    """All policies on the documents of one length."""
    suite = {
        (seed, i): case
        for seed in args.seeds
        for i, case in enumerate(make_suite(tokenizer, length, args.documents, columns=8, seed=seed))
    }
    prompts = [
        tokenizer.apply_chat_template(case.messages, add_generation_prompt=True, return_dict=False)
        for case in suite.values()
    ]
    dense: dict[Place, bool] = {}
    for policy in policies:
        if args.kept_sets:
            llm.llm_engine.collective_rpc(check_next, args=(2 if policy.name in CHECKED else 0,))
        began = time.perf_counter()
        outputs = run(llm, prompts, policy.body["kv_cache"], 24)
        seconds = time.perf_counter() - began
        found = {
            place: case.found_in(output.outputs[0].text)
            for (place, case), output in zip(suite.items(), outputs, strict=True)
        }
        dense = dense or found
        usage = outputs[0].kv_transfer_params["kv_cache"]
        say(tokens=length, policy=policy.label, **tally(found, dense), kept=usage["usage"]["kept_tokens"],
            seconds=round(seconds, 1), totals=usage["totals"].get(policy.name))  # fmt: skip


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--documents", type=int, default=32, help="of each seed and length")
    parser.add_argument("--lengths", type=numbers, default=[2500, 4900, 7300])
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument("--policies", nargs="+", default=POLICIES, metavar="NAME:BUDGET[,ARG=VALUE...]")
    parser.add_argument("--no-kept-sets", dest="kept_sets", action="store_false", help="compare nothing with the CPU")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--kv-heads", type=int, help="pad the model to so many")
    parser.add_argument("--kv-gib", type=int, default=8, help="KV cache of each GPU")
    parser.add_argument("--fp8", action="store_true")
    args = parser.parse_args()
    policies = parse_policies(args.policies)
    model = args.model
    if args.kv_heads:
        model = pad_heads(Path(model), Path(tempfile.mkdtemp()), args.kv_heads)
    tokenizer = AutoTokenizer.from_pretrained(model)
    llm = build(
        str(model), max_model_len=8192, gpu_memory_utilization=0.3, max_num_batched_tokens=4096,
        keep_positions=args.kept_sets, tensor_parallel_size=args.tensor_parallel,
        kv_cache_dtype="fp8" if args.fp8 else "auto", kv_cache_memory_bytes=args.kv_gib << 30,
        max_num_seqs=min(128, args.documents * len(args.seeds)), compilation_config=FEW_GRAPHS,
    )  # fmt: skip
    if args.kept_sets:
        llm.llm_engine.collective_rpc(install_check)
    for length in args.lengths:
        measure(llm, tokenizer, length, policies, args)
    if args.kept_sets:
        say(kept_sets_compared_with_cpu_by_gpu=llm.llm_engine.collective_rpc(checked))
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    say(blocks_leaked=pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())


if __name__ == "__main__":
    main()
