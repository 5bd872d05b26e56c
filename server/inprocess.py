"""A vLLM engine with compression inside this process, from the flags of `longreach serve`.

For programs that look into the engine (kept positions) or drive it step by step: `longreach explain`, benchmarks.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import vllm
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor

from attention_plugins.decode.registry import FIELD as DECODE_FIELD
from attention_plugins.prefill.registry import FIELD as PREFILL_FIELD
from kvcache.registry import policy_words
from kvcache.vllm_adapter.scheduler import EXTRA_ARG
from server.arguments import parse, resolve_model
from server.decode_settings import pass_selectors
from server.errors import StartError, one_line
from server.flags import tell_workers
from server.platforms import Platform, choose_scheduler, detect, prepare
from server.prefill_settings import pass_patterns
from server.refusals import refuse_args, refuse_config


@dataclass
class Job:
    """One request and what became of it.

    Attributes:
        prompt: token ids.
        params: vLLM's sampling parameters; `words` are added to its `extra_args`.
        words: the request's policy, `{"policy": name, ...}`.
        selector: its selector, `{"selector": name, ...}`; None reads everything.
        pattern: its pattern, `{"pattern": name, ...}`; None computes all of the prompt's attention.
        output: vLLM's last output, once the job is done.
        kept: kept prompt positions below the tail by layer and KV head; empty unless the engine keeps positions
            and the prompt was compacted.
    """

    prompt: list[int]
    params: SamplingParams
    words: dict[str, Any]
    selector: dict[str, Any] | None = None
    pattern: dict[str, Any] | None = None
    output: Any = None
    kept: list[list[torch.Tensor]] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """The answer's."""
        return list(self.output.outputs[0].token_ids)

    @property
    def usage(self) -> dict[str, Any]:
        """As `usage.kv_cache` of the server's answers."""
        return dict(self.output.kv_transfer_params[EXTRA_ARG]["usage"])

    @property
    def decode_usage(self) -> dict[str, Any]:
        """As `usage.decode_attention`; empty where everything was read."""
        return dict(self.output.kv_transfer_params[EXTRA_ARG].get("decode_usage") or {})

    @property
    def prefill_usage(self) -> dict[str, Any]:
        """As `usage.prefill_attention`; empty where everything was computed."""
        return dict(self.output.kv_transfer_params[EXTRA_ARG].get("prefill_usage") or {})

    @property
    def extra_args(self) -> dict[str, Any]:
        """What the scheduler looks at."""
        optional = {DECODE_FIELD: self.selector, PREFILL_FIELD: self.pattern}
        return {EXTRA_ARG: self.words, **{name: words for name, words in optional.items() if words}}


class InProcessEngine:
    """vLLM's synchronous engine, and our compressor beside it.

    Attributes:
        page_size: tokens per page.
        max_model_len: tokens of a prompt and its answer, at most.
        tokenizer: the model's, of transformers.
        device: what it runs on, in words; `version`: vLLM's.
    """

    def __init__(self, engine: LLMEngine) -> None:
        self.engine = engine
        config = engine.vllm_config
        self.page_size: int = config.cache_config.block_size
        self.max_model_len: int = config.model_config.max_model_len
        self.tokenizer: Any = engine.renderer.tokenizer
        self.device = current_platform.get_device_name() or current_platform.device_type
        self.version: str = vllm.__version__
        self._number = 0

    @property
    def _worker(self) -> Any:
        worker: Any = self.engine.model_executor.driver_worker
        return worker.worker

    @property
    def missing(self) -> dict[str, str]:
        """Evidence that can't be gathered here, and why, for `PolicyDesk.lacks`."""
        return dict(self._worker.missing_evidence())

    def run(self, jobs: Sequence[Job], done: Callable[[Job], None] = lambda job: None) -> Sequence[Job]:
        """Run all jobs at once; `done` is called as each of them ends.

        Raises:
            ValueError: vLLM refuses a prompt or its parameters.
        """
        running: dict[str, Job] = {}
        for job in jobs:
            name, self._number = f"job{self._number}", self._number + 1
            job.params.extra_args = {**(job.params.extra_args or {}), **job.extra_args}
            self.engine.add_request(name, {"prompt_token_ids": job.prompt}, job.params)
            running[name] = job
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            self._take_kept(running)
            for output in outputs:
                if output.finished:
                    job = running.pop(output.request_id)
                    job.output = output
                    done(job)
        return jobs

    def _take_kept(self, running: dict[str, Job]) -> None:
        """Remember kept positions before the compressor forgets the request, one step after its end."""
        compressor = self._worker.runtime.compressor
        if not compressor.keep_positions:
            return
        for name in compressor.requests:
            job = running.get(name.rpartition("-")[0])  # vLLM adds a suffix to our names
            if job and not job.kept:
                job.kept = [[positions.cpu() for positions in heads] for heads in compressor.kept_positions(name)]


def build_engine(argv: list[str], *, keep_positions: bool = False, **settings: Any) -> InProcessEngine:
    """Start one from words of the command line of `longreach serve`.

    Args:
        argv: `[MODEL] [flags]`; without a model, the embedded one.
        keep_positions: remember which prompt positions stay (`Job.kept`).
        settings: vLLM's arguments by their Python names, where argv doesn't give them.

    Raises:
        StartError: the flags, the model, or this machine; one line says why.
        EmbeddedModelError: the embedded model can't be provided.
    """
    platform = detect()
    args = parse(argv, platform)
    make_ready(args, platform)
    return start_engine(args, platform, keep_positions=keep_positions, **settings)


def make_ready(args: Namespace, platform: Platform) -> None:
    """Refuse what can't be, and fill in the rest, in place. Selectors are there where the flags name some: few such
    engines use them, and each costs memory.

    Raises:
        StartError, EmbeddedModelError: as `build_engine`.
    """
    if platform.unavailable is not None:
        raise StartError(platform.unavailable)
    refuse_args(args, compresses=True)
    if args.tensor_parallel_size > 1:
        raise StartError("--tensor-parallel-size: an engine inside one process has one worker")
    prepare(args, platform)
    pass_patterns(args, platform)
    if args.decode_selectors:
        pass_selectors(args, platform, policy_words(None))
    resolve_model(args)


def start_engine(
    args: Namespace, platform: Platform, *, keep_positions: bool = False, **settings: Any
) -> InProcessEngine:
    """As `build_engine`, from parsed flags that are ready.

    Raises:
        StartError: as there.
    """
    vars(args).update(settings, disable_log_stats=True)
    if keep_positions:
        tell_workers(args, keep_positions=True)
    # vLLM's CPU platform reads it where the configuration is made, and starts a worker process if it isn't set.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        config = EngineArgs.from_cli_args(args).create_engine_config()
        refuse_config(config, platform.name)
        choose_scheduler(config)
        engine = LLMEngine(
            config, executor_class=Executor.get_class(config), log_stats=False, multiprocess_mode=False
        )  # fmt: skip
    except (ValueError, OSError, NotImplementedError) as error:
        raise StartError(f"{args.model} can't be served: {one_line(error)}") from error
    return InProcessEngine(engine)
