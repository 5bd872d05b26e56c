"""Many mixed requests in a small pool: policies, lengths, shared prefixes, aborts, preemptions. Nothing may leak, and
every answer has to be what the request gets alone. (`benchmarks.soak` asks a server for everything, with canaries;
this compares every answer.)

VLLM_BATCH_INVARIANT=1 python -m benchmarks.gpu.stress MODEL_FOLDER|random:128 [--requests 256] [--blocks 2600]
    [--alone 128] [--selectors] [--patterns] [--plain] [--stock] [--flash-attention 2] [--no-prefix-cache]
    [--whole-prompts]

With --plain the same requests have no policy, with --stock vLLM is as it is: what differs then is its own variance.

On Hopper vLLM 0.32's batch-invariant mode leaves one source of it: FlashAttention 3 takes another kernel for a decoding
row when some other row of the batch has a prompt (vllm-project/vllm issues 47069 and 51902; `benchmarks.gpu.invariance`
shows it without a model). --flash-attention 2 is without it, so what differs then would be something else, and
--no-prefix-cache, --whole-prompts (no chunks) or more --blocks (no preemption) may tell what.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.engine import FEW_GRAPHS, build, random_model, say
from benchmarks.soak.mix import PATTERNS, SELECTORS, WHOLE_CACHES
from kvcache.usage import CompressionTotals
from kvcache.vllm_adapter.audit import BlockAudit

POLICIES: list[dict[str, Any]] = [
    {"policy": "none"},
    {"policy": "snapkv", "budget": 256},
    {"policy": "snapkv", "budget": "30%"},
    {"policy": "pyramidkv", "budget": 512},
    {"policy": "l2norm", "budget": 384},
    {"policy": "streamingllm", "budget": 128},
    {"policy": "random", "budget": 200},
]


@dataclass
class Job:
    name: str
    prompt: list[int]
    words: dict[str, Any]
    tokens: int
    abort_after: int | None
    answer: tuple[int, ...] = ()
    compacted: bool = False
    preemptions: int = 0
    selector: dict[str, Any] | None = None
    pattern: dict[str, Any] | None = None

    @property
    def fields(self) -> dict[str, Any]:
        asked = {"kv_cache": self.words, "decode_attention": self.selector, "prefill_attention": self.pattern}
        return {name: words for name, words in asked.items() if words}


def make_jobs(number: int, vocabulary: int) -> list[Job]:
    """Prompts of 20 to 7,000 tokens; every third one begins like others."""
    choose = random.Random(7)
    shared = [[choose.randrange(100, vocabulary) for _ in range(2000)] for _ in range(3)]
    jobs = []
    for i in range(number):
        length = int(20 * (7000 / 20) ** choose.random())
        prompt = [choose.randrange(100, vocabulary) for _ in range(length)]
        if i % 3 == 0:
            prompt = (choose.choice(shared) + prompt)[:7000]
        abort = choose.randrange(1, 40) if i % 5 == 4 else None
        jobs.append(Job(f"r{i}", prompt, POLICIES[i % len(POLICIES)], choose.randrange(40, 200), abort))
    return jobs


def give_selectors(jobs: list[Job]) -> None:
    """To three of four, in place."""
    for i, job in enumerate(jobs):
        words = SELECTORS[i // 4 % len(SELECTORS)]
        if i % 4 and (job.words["policy"] == "none" or words["selector"] not in WHOLE_CACHES):
            job.selector = {"tokens": 128, "min_context": 0, **words}


def run(llm: Any, jobs: list[Job], audit: BlockAudit) -> None:
    from vllm import SamplingParams

    engine, by_name = llm.llm_engine, {job.name: job for job in jobs}
    scheduler = engine.engine_core.engine_core.scheduler
    for job in jobs:
        params = SamplingParams(
            max_tokens=job.tokens, temperature=0, ignore_eos=True, detokenize=False, extra_args=job.fields
        )
        engine.add_request(job.name, {"prompt_token_ids": job.prompt}, params)
    while engine.has_unfinished_requests():
        aborted = []
        for output in engine.step():
            job = by_name[output.request_id]
            job.answer = tuple(output.outputs[0].token_ids)
            if told := (output.kv_transfer_params or {}).get("kv_cache"):  # stock vLLM tells nothing
                job.compacted = told["usage"]["kept_tokens"]["mean"] < len(job.prompt)
            if job.abort_after is not None and len(job.answer) >= job.abort_after and not output.finished:
                aborted.append(job.name)
        for request in scheduler.requests.values():
            job = by_name[request.request_id.rpartition("-")[0]]
            job.preemptions = max(job.preemptions, request.num_preemptions)
        if aborted:
            engine.abort_request(aborted)
        audit.check(scheduler.requests)


def compare(llm: Any, jobs: list[Job], audit: BlockAudit, alone: int) -> None:
    """Run all jobs at once, then some again alone; tell how many answers differ."""
    began = time.perf_counter()
    run(llm, jobs, audit)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    totals = getattr(scheduler, "compression_totals", CompressionTotals()).by_policy.values()
    say(requests=len(jobs), aborted=sum(job.abort_after is not None for job in jobs), peak_blocks=audit.peak,
        preemptions=sum(job.preemptions for job in jobs),
        preempted_with_policy=sum(job.words["policy"] != "none" and job.preemptions > 0 for job in jobs),
        invariant_checks=audit.checks, seconds=round(time.perf_counter() - began, 1),
        compactions=sum(int(values["compactions"]) for values in totals),
        blocks_leaked=audit.used)  # fmt: skip
    different, compacted = [], 0
    for job in jobs[:alone]:
        again = Job(job.name, job.prompt, job.words, job.tokens, None, selector=job.selector, pattern=job.pattern)
        llm.reset_prefix_cache()
        run(llm, [again], audit)
        compacted += again.compacted
        if again.answer[: len(job.answer)] != job.answer:
            different.append(difference(job, again))
    compared = len(jobs[:alone])
    say(compared_with_alone=compared, same=compared - len(different),
        compacted=compacted, different_compacted=sum(row["compacted"] for row in different),
        different_preempted=sum(row["preemptions"] > 0 for row in different), different=different)  # fmt: skip


def difference(job: Job, alone: Job) -> dict[str, Any]:
    """What there is to know of a request whose answer differs; `token` is the first that does."""
    pairs = enumerate(zip(job.answer, alone.answer, strict=False))
    first = next((i for i, (one, other) in pairs if one != other), len(alone.answer))
    return {
        "name": job.name, "policy": job.words["policy"], "selector": (job.selector or {}).get("selector"),
        "pattern": (job.pattern or {}).get("pattern"),
        "prompt": len(job.prompt), "compacted": alone.compacted,
        "preemptions": job.preemptions, "token": first,
    }  # fmt: skip


def classes(llm: Any) -> dict[str, str]:
    """What really runs: with --stock nothing of ours may be among it."""
    core = llm.llm_engine.engine_core.engine_core
    worker = llm.llm_engine.model_executor.driver_worker.worker
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    backends = {layer.attn_backend for layer in layers if hasattr(layer, "attn_backend")}
    parts = {"scheduler": {type(core.scheduler)}, "worker": {type(worker)}, "attention": backends}
    return {name: ", ".join(f"{part.__module__}.{part.__name__}" for part in found) for name, found in parts.items()}


def main() -> None:
    from vllm import envs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or random:HEAD_SIZE for random weights")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=2600)
    parser.add_argument("--alone", type=int, default=128, help="how many are run again alone")
    parser.add_argument("--plain", action="store_true", help="no policies")
    parser.add_argument("--selectors", action="store_true", help="most requests have a selector, too")
    parser.add_argument("--patterns", action="store_true", help="most prompts have a pattern, too")
    parser.add_argument("--stock", action="store_true", help="vLLM as it is")
    parser.add_argument("--flash-attention", type=int, choices=(2, 3), help="version; vLLM chooses 3 on Hopper")
    parser.add_argument("--no-prefix-cache", dest="prefix_cache", action="store_false")
    parser.add_argument("--whole-prompts", action="store_true", help="no prompt is computed in chunks")
    args = parser.parse_args()
    random_weights, _, head_size = args.model.partition(":")
    model = random_model(int(head_size)) if random_weights == "random" and head_size else args.model
    llm = build(
        model, compress=not args.stock, max_model_len=8192, gpu_memory_utilization=0.3,
        max_num_batched_tokens=8192 if args.whole_prompts else 2048, max_num_seqs=256,
        num_gpu_blocks_override=args.blocks, kv_cache_memory_bytes=2 << 30,
        enable_chunked_prefill=not args.whole_prompts, enable_prefix_caching=args.prefix_cache,
        attention_config={"flash_attn_version": args.flash_attention}, compilation_config=FEW_GRAPHS,
        skip_tokenizer_init=model != args.model, **({} if args.stock else {"audit": 1}),
        **({"decode": {"selectors": sorted({words["selector"] for words in SELECTORS})}} if args.selectors else {}),
    )  # fmt: skip
    say(batch_invariant=envs.VLLM_BATCH_INVARIANT, plain=args.plain, flash_attention=args.flash_attention,
        prefix_cache=args.prefix_cache, whole_prompts=args.whole_prompts, **classes(llm))  # fmt: skip
    jobs = make_jobs(args.requests, 49000)
    if args.plain or args.stock:
        for job in jobs:
            job.words = {"policy": "none"}
    if args.selectors:
        give_selectors(jobs)
    for i, job in enumerate(jobs if args.patterns else ()):
        job.pattern = PATTERNS[i // 3 % len(PATTERNS)] if i % 3 else None
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    compare(llm, jobs, BlockAudit(scheduler.kv_cache_manager), args.alone)


if __name__ == "__main__":
    main()
