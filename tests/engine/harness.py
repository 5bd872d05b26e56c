"""vLLM with our classes, in this process, driven step by step."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

# Before vLLM is imported: engine and worker in this process, so that tests see the block pool and the page tables.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

PAGE = 32


@dataclass
class Job:
    """A request and what became of it."""

    prompt: list[int]
    words: dict[str, Any] | None = None
    max_tokens: int = 12
    decode: dict[str, Any] | None = None
    """Its selector."""
    prefill: dict[str, Any] | None = None
    """Its pattern."""
    salt: str | None = None
    tokens: list[int] = field(default_factory=list)
    compactions: list[tuple[int, list[list[torch.Tensor]]]] = field(default_factory=list, repr=False)
    """(tokens computed, positions kept by layer and KV head), one for each."""
    usage: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    """Of its selector, by mode."""
    prefilled: dict[str, Any] = field(default_factory=dict)
    """What is told of its pattern."""
    cached_tokens: int | None = None
    preemptions: int = 0
    tokens_when_preempted: int = 0
    request_id: str = ""
    finished: bool = False

    @property
    def kept(self) -> list[list[torch.Tensor]]:
        """Of the first compaction."""
        return self.compactions[0][1] if self.compactions else []


class Engine:
    """One engine for many tests: settings that matter can be changed between runs."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "float32",
        blocks: int = 1600,
        max_model_len: int = 8192,
        decode: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        """
        Args:
            decode: settings of selectors (`attention_plugins.decode.settings`).
            settings: more of vLLM's.
        """
        from vllm import LLM

        self.llm = LLM(
            model=model,
            dtype=dtype,
            enforce_eager=True,
            compilation_config={"custom_ops": ["none"]},
            max_model_len=max_model_len,
            block_size=PAGE,
            num_gpu_blocks_override=blocks,
            kv_cache_memory_bytes=2 << 30,
            max_num_batched_tokens=8192,
            max_num_seqs=64,
            skip_tokenizer_init=True,
            worker_cls="attention_plugins.vllm_adapter.cpu_worker.CPUCompressionWorker",
            scheduler_cls="kvcache.vllm_adapter.scheduler.CompressionScheduler",
            additional_config={"longreach": {"keep_positions": True, "decode": decode or {}}},
            **settings,
        )
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.manager = self.scheduler.kv_blocks
        self.worker = core.model_executor.driver_worker.worker
        self.runtime = self.worker.runtime
        self.compressor = self.runtime.compressor
        self.all_free = self.pool.get_num_free_blocks()
        self._chunk = self.scheduler.max_num_scheduled_tokens
        self._numbers = count()
        self._jobs: dict[str, Job] = {}

    @property
    def free(self) -> int:
        return int(self.pool.get_num_free_blocks())

    def set_chunk(self, tokens: int | None) -> None:
        """Schedule at most this many tokens a step: the chunk of a long prompt. None: back to the start's value."""
        self.scheduler.max_num_scheduled_tokens = tokens or self._chunk

    def forget_prefixes(self) -> None:
        assert self.scheduler.reset_prefix_cache()

    def add(self, job: Job) -> Job:
        from vllm import SamplingParams

        job.request_id = f"job-{next(self._numbers)}"
        asked = {"kv_cache": job.words, "decode_attention": job.decode, "prefill_attention": job.prefill}
        extra = {name: words for name, words in asked.items() if words} or None
        params = SamplingParams(
            max_tokens=job.max_tokens, temperature=0, ignore_eos=True, detokenize=False, extra_args=extra
        )
        prompt = {"prompt_token_ids": job.prompt} | ({"cache_salt": job.salt} if job.salt else {})
        self.llm.llm_engine.add_request(job.request_id, prompt, params)
        self._jobs[job.request_id] = job
        return job

    def abort(self, job: Job) -> None:
        self.llm.llm_engine.abort_request([job.request_id])
        job.finished = True

    def internal(self, job: Job) -> Any:
        """vLLM's request object while the request lives."""
        requests = self.scheduler.requests.values()
        return next((request for request in requests if request.request_id.startswith(job.request_id + "-")), None)

    def step(self) -> None:
        for output in self.llm.llm_engine.step():
            job = self._jobs[output.request_id]
            job.tokens = list(output.outputs[0].token_ids)
            job.finished = output.finished
            if output.num_cached_tokens is not None:
                job.cached_tokens = output.num_cached_tokens
            if output.kv_transfer_params:
                job.usage = output.kv_transfer_params["kv_cache"]["usage"]
                job.steps = output.kv_transfer_params["kv_cache"].get("decode_usage", {}).get("steps", {})
                job.prefilled = output.kv_transfer_params["kv_cache"].get("prefill_usage", {})
        for request in self.scheduler.requests.values():
            name = request.request_id.rpartition("-")[0]
            if name in self._jobs:
                job = self._jobs[name]
                if request.num_preemptions > job.preemptions:
                    job.preemptions, job.tokens_when_preempted = request.num_preemptions, len(job.tokens)
                known = self.compressor.requests.get(request.request_id)
                if known and known.boundary > (job.compactions[-1][0] if job.compactions else 0):
                    job.compactions.append((known.boundary, self.compressor.kept_positions(request.request_id)))

    def run(self, jobs: list[Job], until: Callable[[], bool] | None = None) -> list[Job]:
        """Add the jobs and step until all requests are done, or until `until` says so."""
        for job in jobs:
            self.add(job)
        while self.llm.llm_engine.has_unfinished_requests() and not (until and until()):
            self.step()
        return jobs

    def finish(self) -> None:
        """Step until nothing is left, one empty step more so that workers hear of it."""
        self.run([])


def same_kept(a: Job, b: Job) -> bool:
    """Whether two runs kept the same prompt positions in every layer and KV head."""
    return (
        bool(a.kept)
        and len(a.kept) == len(b.kept)
        and all(torch.equal(x, y) for p, q in zip(a.kept, b.kept, strict=True) for x, y in zip(p, q, strict=True))
    )
