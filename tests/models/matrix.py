"""Serve every specimen of the zoo, with and without our classes, and tell what became of it: one JSON line each.

python -m tests.models.matrix [--cuda] [NAME ...]

In a process of its own: vLLM keeps what the first engine of a process has set up, and expert parallelism is there only
where that one was a mixture of experts.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry
from vllm.v1.attention.selector import _cached_get_attn_backend

from attention_plugins.prefill.orders import PATTERNS
from server.rules import POLICIES as POLICIES_REFUSED
from server.rules import refused
from tests.models.zoo import MAX_LEN, VOCABULARY, ZOO, Specimen, write
from tests.reference import Reference

POLICIES: list[dict[str, Any]] = [{"policy": "snapkv", "budget": 320}, {"policy": "pyramidkv", "budget": 288}]
MOMENTS = {"policy": "expectedattention", "budget": 320}
SELECTOR = {"selector": "quest", "tokens": 64, "min_context": 0}
PROMPT, ANSWER, BLOCKS = 650, 24, {"cpu": 240, "cuda": 480}
PAGES = {"cpu": 32, "cuda": 16}
WORKERS = {"cpu": "cpu_worker.CPUCompressionWorker", "cuda": "cuda_worker.CUDACompressionWorker"}
SCHEDULERS = {"cpu": "CompressionScheduler", "cuda": "AsyncCompressionScheduler"}


def build(folder: Path, specimen: Specimen, device: str, *, ours: bool) -> LLM:
    settings: dict[str, Any] = {}
    if device == "cpu":
        settings |= {"enforce_eager": True, "compilation_config": {"custom_ops": ["none"]}}
    if ours:
        decode = {"selectors": ["quest"] if specimen.selectors else []}
        settings |= {
            "worker_cls": f"attention_plugins.vllm_adapter.{WORKERS[device]}",
            "scheduler_cls": f"kvcache.vllm_adapter.scheduler.{SCHEDULERS[device]}",
            "additional_config": {"longreach": {"keep_positions": True, "decode": decode}},
        }
    if ours and device == "cuda":
        from attention_plugins.vllm_adapter import cuda_backend

        cuda_backend.register()
        settings["attention_backend"] = "CUSTOM"
    if specimen.quantised:
        settings["load_format"] = "dummy"
    if device == "cuda":
        settings["gpu_memory_utilization"] = 0.1  # others may use the GPU, too
    return LLM(
        model=str(folder), dtype=served_dtype(specimen, device), max_model_len=MAX_LEN, block_size=PAGES[device],
        num_gpu_blocks_override=BLOCKS[device], kv_cache_memory_bytes=1 << 30, max_num_batched_tokens=MAX_LEN,
        max_num_seqs=8, skip_tokenizer_init=True, **settings,
    )  # fmt: skip


def served_dtype(specimen: Specimen, device: str) -> str:
    return "bfloat16" if device == "cuda" and specimen.dtype == "float32" else specimen.dtype


def prompt_of(length: int) -> list[int]:
    generator = random.Random(length)
    return [generator.randrange(3, VOCABULARY) for _ in range(length)]


SCALES = {torch.int32: 0.03, torch.uint8: 0.03, torch.int8: 0.002}
"""That make weights of some 0.25 of these integers: with vLLM's made-up ones, answers don't depend on the prompt."""


def fill(model: torch.nn.Module) -> None:
    """Draw quantised weights, whose integers vLLM leaves as memory was when it makes them up."""
    generator, scale = torch.Generator().manual_seed(0), 0.0
    weights = dict(sorted(model.named_parameters()))
    for name, weight in weights.items():
        if weight.dtype in SCALES and name.endswith(("weight", "_packed", "qzeros")):
            drawn = torch.randint(0, 256, (weight.numel(), weight.element_size()), generator=generator)
            weight.data.copy_(drawn.to(torch.uint8).view(weight.dtype).view(weight.shape))
            scale = SCALES[weight.dtype]
    for name, weight in weights.items():
        if scale and name.endswith(("scales", "weight_scale")):
            weight.data.fill_(scale)


class Run:
    """One engine, driven step by step."""

    def __init__(self, llm: LLM) -> None:
        self.engine = llm.llm_engine
        core: Any = self.engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.worker = core.model_executor.driver_worker.worker
        fill(self.worker.get_model())
        self.held: list[int] = []
        """Blocks in use, step by step, of the last request."""
        self.kept: list[list[torch.Tensor]] = []
        """Positions that it kept of its prompt, by layer and KV head."""

    def answer(self, prompt: list[int], **extra: Any) -> Any:
        """One request's last output."""
        params = SamplingParams(
            max_tokens=ANSWER, temperature=0, ignore_eos=True, detokenize=False, extra_args=extra or None
        )
        free, self.held = self.pool.get_num_free_blocks(), []
        self.engine.add_request("r", {"prompt_token_ids": prompt}, params)
        output = None
        while self.engine.has_unfinished_requests():
            output = next(iter(self.engine.step()), output)
            self.held.append(free - self.pool.get_num_free_blocks())
            if runtime := getattr(self.worker, "runtime", None):
                for name in runtime.compressor.requests:
                    self.kept = runtime.compressor.kept_positions(name)
        return output


def refusal(folder: Path, specimen: Specimen, device: str) -> str | None:
    """The rule that a start would name."""
    config = EngineArgs(
        model=str(folder), dtype=served_dtype(specimen, device), max_model_len=MAX_LEN, skip_tokenizer_init=True
    ).create_engine_config()
    return "; ".join(rule.name for rule in refused(config, device, POLICIES_REFUSED)) or None


def tokens_of(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


def told(output: Any) -> dict[str, Any]:
    return dict(output.kv_transfer_params["kv_cache"])


def stock(folder: Path, specimen: Specimen, device: str) -> dict[str, list[int]]:
    """Answers of vLLM as it is: the first, one from the prefix cache, and one without it."""
    run, prompt = Run(build(folder, specimen, device, ours=False)), prompt_of(PROMPT)
    found = {"stock": tokens_of(run.answer(prompt)), "stock_again": tokens_of(run.answer(prompt))}
    run.scheduler.reset_prefix_cache()
    return found | {"stock_anew": tokens_of(run.answer(prompt))}


def examine(folder: Path, specimen: Specimen, device: str) -> dict[str, Any]:
    """The answers with our classes and what they held; by transformers in float32, the dense answer, and compressed
    ones as attention with columns masked."""
    run = Run(build(folder, specimen, device, ours=True))
    prompt, all_free = prompt_of(PROMPT), run.pool.get_num_free_blocks()
    dense = run.answer(prompt)
    again = run.answer(prompt)
    row: dict[str, Any] = {
        "layers": [layer.layer_name for layer in run.worker.attention_layers],
        "none": tokens_of(dense),
        "again": tokens_of(again),
        "cached_tokens": again.num_cached_tokens,
        "block_bytes": run.scheduler.block_bytes,
        "page": run.scheduler.kv_blocks.block_size,
        "missing": run.worker.missing_evidence(),
        "beside": run.scheduler.beside.blocks(PROMPT),
        "policies": [],
    }
    reference = Reference(str(folder)) if device == "cpu" and specimen.exact else None
    if reference:
        row["reference"] = reference.greedy(prompt, ANSWER)[0]
    policies = [*POLICIES, *([] if "query moments" in row["missing"] else [MOMENTS])]
    for words in policies:
        run.scheduler.reset_prefix_cache()
        output = run.answer(prompt, kv_cache=words)
        done = {"words": words, "tokens": tokens_of(output), "usage": told(output)["usage"], "held": run.held}
        if reference:
            done["masked"] = reference.greedy(prompt, ANSWER, run.kept, PROMPT // row["page"] * row["page"])[0]
        row["policies"].append(done)
    if specimen.selectors:
        output = run.answer(prompt, decode_attention=SELECTOR)
        row["selector"] = {"tokens": tokens_of(output), "steps": told(output)["decode_usage"]["steps"]}
    if specimen.selectors and PATTERNS not in row["missing"]:
        row["patterns"] = []
        for window in (PROMPT, 1):  # all of it, and next to nothing
            pattern = {"pattern": "streaming", "sinks": 1, "window": window, "min_context": 0}
            output = run.answer(prompt, prefill_attention=pattern)
            density = told(output)["prefill_usage"]["density"]["by_layer"]
            row["patterns"].append({"tokens": tokens_of(output), "density": density})
    row["leaked"] = all_free - run.pool.get_num_free_blocks()
    return row


def drop() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="all of the zoo, if none is given")
    parser.add_argument("--cuda", action="store_true")
    args = parser.parse_args()
    device = "cuda" if args.cuda else "cpu"
    # vLLM asks each model class for its features in a process of its own (10 s each).
    registry._run_in_subprocess = lambda ask: ask()
    # Each engine's end collects garbage several times, through all that imports left: most of the time otherwise.
    gc.unfreeze = lambda: None
    names = sorted(args.names or ZOO, key=lambda name: not ZOO[name].experts)
    folders = {name: write(name, Path(tempfile.mkdtemp()) / name) for name in names}
    why = {name: refusal(folders[name], ZOO[name], device) for name in names}
    for name in names:
        if why[name]:
            print(json.dumps({"name": name, "device": device, "refused": why[name]}), flush=True)
    names = [name for name in names if not why[name]]
    expected = {}
    for name in names:  # before our backend takes the place of vLLM's
        expected[name] = stock(folders[name], ZOO[name], device)
        drop()
    _cached_get_attn_backend.cache_clear()
    for name in names:
        began = time.perf_counter()
        row = {"name": name, "device": device, **expected[name], **examine(folders[name], ZOO[name], device)}
        drop()
        print(json.dumps(row | {"seconds": round(time.perf_counter() - began, 1)}), flush=True)


if __name__ == "__main__":
    main()
