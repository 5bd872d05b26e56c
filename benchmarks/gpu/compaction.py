"""Compaction alone, on a cache of 8B shapes without an engine: correct, and how long it takes.

python -m benchmarks.gpu.compaction [PROMPT ...]
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

from benchmarks.gpu.engine import LLAMA_8B, say
from kvcache.compressor import Compact, Compressor, Start
from kvcache.evidence import PagedEvidence, QuantScales
from kvcache.pages import InterleavedCodec, PageGeometry
from kvcache.registry import BUILT_IN, make_policy
from kvcache.scorers import window_attention, window_votes
from kvcache.tables import PageTables

PAGE, BUDGET = 16, 2048
POLICIES: list[dict[str, Any]] = [
    {"policy": policy.name, "budget": BUDGET} for policy in BUILT_IN if "budget" in policy.Args.model_fields
]


class Cache:
    """A random cache of one prompt, its queries, and room for what stays."""

    def __init__(self, prompt: int, fp8: bool = False) -> None:
        layers, self.heads = LLAMA_8B["num_hidden_layers"], LLAMA_8B["num_attention_heads"]
        kv_heads, self.dim = LLAMA_8B["num_key_value_heads"], LLAMA_8B["head_dim"]
        blocks = -(-prompt // PAGE) + BUDGET // PAGE + 1
        base = tuple(layer * blocks * kv_heads for layer in range(layers))
        self.geometry = PageGeometry(base, kv_heads, kv_heads, PAGE, self.dim)
        shape = (layers * blocks * kv_heads, 2 * PAGE * self.dim)
        pages = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
        self.pages = pages.to(torch.float8_e4m3fn).view(torch.uint8) if fp8 else pages
        self.codec = InterleavedCodec(PAGE, self.dim)
        self.blocks = torch.randperm(blocks).tolist()
        self.prompt, self.layers = prompt, layers
        self.fp8 = fp8

    def compressor(self) -> Compressor:
        tables = PageTables(self.geometry, slots=4, width=self.prompt // PAGE, device="cuda")
        quant = [QuantScales(0.5, 0.25, 2.0)] * self.layers if self.fp8 else ()
        return Compressor(self.geometry, self.codec, self.pages, tables, scale=self.dim**-0.5, quant=quant)

    def queries(self, window: int) -> torch.Tensor:
        queries = torch.randn(window, self.heads, self.dim, dtype=torch.bfloat16, device="cuda")
        return queries.to(torch.float8_e4m3fn) if self.fp8 else queries

    def compact(self, compressor: Compressor, words: dict[str, Any]) -> tuple[float, float]:
        """Seconds of the GPU's work and seconds until the host went on."""
        policy = make_policy(words)
        assert policy is not None
        plan = policy.plan(self.prompt, PAGE)
        assert plan is not None
        compressor.start(Start("r", words, plan))
        for observer in compressor.observers("r"):
            for layer in range(self.layers):
                observer.record(layer, observer.first, self.queries(observer.end - observer.first))
        source = -(-self.prompt // PAGE)
        order = Compact("r", self.blocks[:source], self.blocks[source : source + plan.kept_pages], self.prompt)
        torch.cuda.synchronize()
        began = time.perf_counter()
        pending = compressor.compact(order)
        host = time.perf_counter() - began
        return pending.finish().seconds, host


def check_votes(cache: Cache) -> None:
    """The kernels' scores against torch's, in float32."""
    compressor, window = cache.compressor(), cache.queries(32)
    blocks = torch.tensor(cache.blocks[: -(-cache.prompt // PAGE)], device="cuda")
    evidence = PagedEvidence(
        3, cache.pages, cache.geometry.pages_of(3, blocks), cache.geometry, cache.codec, prompt_len=cache.prompt,
        raw_queries=window, scale=compressor.scale, quant=compressor.quant[3],
    )  # fmt: skip
    options: dict[str, Any] = {"pooling": "max", "kernel": 21, "group_reduce": "mean"}
    ours = window_votes(evidence, **options)
    assert evidence.window_queries is not None
    twin = window_attention(evidence.window_queries, evidence.keys, evidence.scale, **options)
    overlap = []
    for mine, theirs in zip(ours, twin, strict=True):
        a, b = set(mine.topk(BUDGET).indices.tolist()), set(theirs.topk(BUDGET).indices.tolist())
        overlap.append(len(a & b) / BUDGET)
    say(prompt=cache.prompt, fp8=cache.fp8, votes_relative_error=float(((ours - twin).abs() / twin.abs().amax()).max()),
        same_top=min(overlap))  # fmt: skip


def main(prompts: list[int]) -> None:
    for prompt in prompts:
        for fp8 in (False, True):
            cache = Cache(prompt, fp8)
            check_votes(cache)
            compressor = cache.compressor()
            for words in POLICIES:
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                times = [cache.compact(compressor, words) for _ in range(6)][2:]
                gpu, host = (statistics.median(values) for values in zip(*times, strict=True))
                peak = torch.cuda.max_memory_allocated() - before
                say(prompt=prompt, fp8=fp8, policy=words["policy"], compaction_ms=round(gpu * 1e3, 2),
                    host_ms=round(host * 1e3, 2), workspace_mib=peak >> 20)  # fmt: skip
            del cache, compressor
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [32768, 126000])
