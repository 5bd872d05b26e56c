"""What a policy costs beside the model, on a cache of 8B shapes without an engine: watching the queries of a prompt, in
chunks, compacting it, and compacting the answer every 128 tokens.

python -m benchmarks.gpu.compaction [--policies NAME,...] [--plain] [--waits] [PROMPT ...]

A policy whose watching or compaction takes over 5 % of stock vLLM's prefill (of `PREFILL_S`) is slow. NAMM and RKV take
time that grows with the square of the prompt: at 126,000 tokens name the policies that you want.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.engine import LLAMA_8B, say
from kvcache.compressor import Compressor
from kvcache.evidence import PagedEvidence, QuantScales
from kvcache.model import ModelFacts
from kvcache.namm import SHAPES, Network
from kvcache.orders import Compact, Start
from kvcache.pages import InterleavedCodec, PageGeometry
from kvcache.registry import BUILT_IN, make_policy, policies
from kvcache.rotary import Rotary
from kvcache.scorers import window_attention, window_votes
from kvcache.tables import PageTables

DEVICE = "cuda"
PAGE, BUDGET, CHUNK, INTERVAL = 16, 2048, 8192, 128
PREFILL_S = {32768: 0.98, 126000: 9.6}
"""Stock vLLM's prefill of these shapes on one H100, measured by `benchmarks.gpu.claims`."""
POLICIES = [policy.name for policy in BUILT_IN if policy.name != "raas"]
"""RaaS compacts answers alone."""
LONG_MS = 10_000
"""A first run as long as this is measured: compiling kernels is nothing beside it."""


def words_for(policy: str) -> dict[str, Any]:
    """With an interval where the policy can have one. DuoAttention has no budget: every other head streams."""
    if policy == "duoattention":
        layers, kv_heads = LLAMA_8B["num_hidden_layers"], LLAMA_8B["num_key_value_heads"]
        return {"policy": policy, "gates": [[head % 2 for head in range(kv_heads)] for _ in range(layers)]}
    return {"policy": policy, "budget": BUDGET, "interval": INTERVAL * policies()[policy].repeats()}


def random_network() -> Network:
    """NAMM's: what the weights are makes no difference to the time."""
    return Network({name: torch.randn(shape, device=DEVICE) for name, shape in SHAPES.items()})


def timed(work: Callable[[], Any]) -> float:
    """Seconds of the GPU's time."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


class Cache:
    """A random cache of one prompt, its queries, and room for what stays: the budget, or a little over half of it."""

    waits = False

    def __init__(self, prompt: int, fp8: bool = False) -> None:
        layers, self.heads = LLAMA_8B["num_hidden_layers"], LLAMA_8B["num_attention_heads"]
        kv_heads, self.dim = LLAMA_8B["num_key_value_heads"], LLAMA_8B["head_dim"]
        source = -(-prompt // PAGE)
        blocks = source + max(BUDGET // PAGE, source // 2 + 64)
        base = tuple(layer * blocks * kv_heads for layer in range(layers))
        self.geometry = PageGeometry(base, kv_heads, kv_heads, PAGE, self.dim)
        shape = (layers * blocks * kv_heads, 2 * PAGE * self.dim)
        pages = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE).normal_()
        self.pages = pages.to(torch.float8_e4m3fn).view(torch.uint8) if fp8 else pages
        self.codec = InterleavedCodec(PAGE, self.dim)
        self.blocks = torch.randperm(blocks).tolist()
        self.prompt, self.layers = prompt, layers
        self.fp8 = fp8

    def compressor(self) -> Compressor:
        tables = PageTables(self.geometry, slots=4, width=self.prompt // PAGE, device=DEVICE)
        quant = [QuantScales(0.5, 0.25, 2.0)] * self.layers if self.fp8 else ()
        angles = torch.arange(self.prompt, device=DEVICE)[:, None] * 500000.0 ** (
            -torch.arange(self.dim // 2, device=DEVICE) / (self.dim // 2)
        )
        model = ModelFacts(Rotary(torch.cat([angles.cos(), angles.sin()], -1), neox=True), random_network())
        return Compressor(self.geometry, self.codec, self.pages, tables, scale=self.dim**-0.5, quant=quant, model=model)

    def queries(self, window: int) -> torch.Tensor:
        queries = torch.randn(window, self.heads, self.dim, dtype=torch.bfloat16, device=DEVICE)
        return queries.to(torch.float8_e4m3fn) if self.fp8 else queries

    def watch(self, compressor: Compressor, first: int, last: int) -> None:
        """All layers of these positions, in chunks."""
        blocks = torch.tensor(self.blocks, device=DEVICE)
        queries = self.queries(CHUNK)
        for start in range(first, last, CHUNK):
            end = min(start + CHUNK, last)
            for observer in compressor.observers("r"):
                begin, stop = observer.overlap(start, end)
                for layer in range(self.layers if begin < stop else 0):
                    pages = self.geometry.pages_of(layer, blocks[: -(-end // PAGE)])
                    so_far = partial(compressor.evidence, layer, pages, end)
                    observer.record(layer, begin, queries[: stop - begin], so_far)

    def compact(self, policy: str) -> dict[str, float]:
        """Milliseconds of the GPU's work, and until the host went on after the compaction of the prompt."""
        compressor, words = self.compressor(), words_for(policy)
        built = make_policy(words)
        assert built is not None
        plan = built.plan(self.prompt, PAGE)
        assert plan is not None
        compressor.start(Start("r", words, plan))
        times = {"watching": timed(lambda: self.watch(compressor, 0, self.prompt))}
        source = -(-self.prompt // PAGE)
        targets = self.blocks[source : source + plan.kept_pages]
        order = Compact("r", self.blocks[:source], targets, self.prompt)
        torch.cuda.synchronize()
        began = time.perf_counter()
        torch.cuda.set_sync_debug_mode("warn" if self.waits else "default")
        pending = compressor.compact(order)
        torch.cuda.set_sync_debug_mode("default")
        times["host"] = time.perf_counter() - began
        times["compaction"] = pending.finish().seconds
        if boundary := plan.next_boundary(self.prompt):
            # What the answer's keys are makes no difference: blocks of the prompt stand in for its own.
            appended = self.blocks[: boundary // PAGE - self.prompt // PAGE]
            for observer in compressor.observers("r"):
                for layer in range(self.layers):
                    observer.record(layer, observer.first, self.queries(observer.end - observer.first))
            times["interval"] = compressor.compact(Compact("r", appended, [], boundary)).finish().seconds
        return {f"{name}_ms": round(seconds * 1e3, 2) for name, seconds in times.items()}


def check_votes(cache: Cache) -> None:
    """The kernels' scores against torch's, in float32."""
    compressor, window = cache.compressor(), cache.queries(32)
    blocks = torch.tensor(cache.blocks[: -(-cache.prompt // PAGE)], device=DEVICE)
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


def measure(cache: Cache, policy: str) -> None:
    """Medians of three runs after one; the second of two where one takes seconds, the only one where it takes many."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = cache.compact(policy)
    taken = first["watching_ms"] + first["compaction_ms"]
    runs = [first] if taken > LONG_MS else [cache.compact(policy) for _ in range(3 if taken < 3e3 else 1)]
    times = {name: statistics.median(run[name] for run in runs) for name in first}
    share = (times["watching_ms"] + times["compaction_ms"]) / 10 / PREFILL_S.get(cache.prompt, math.inf)
    say(prompt=cache.prompt, fp8=cache.fp8, policy=policy, **times, percent_of_prefill=round(share, 2),
        slow=share > 5, workspace_mib=(torch.cuda.max_memory_allocated() - before) >> 20)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", type=int, default=[32768, 126000])
    parser.add_argument("--policies", help="some of them, separated by commas")
    parser.add_argument("--waits", action="store_true", help="warn wherever the host waits for the GPU")
    parser.add_argument("--plain", action="store_true", help="no fp8 cache")
    args = parser.parse_args()
    Cache.waits = args.waits
    for prompt in args.prompts:
        for fp8 in (False,) if args.plain else (False, True):
            cache = Cache(prompt, fp8)
            check_votes(cache)
            for policy in args.policies.split(",") if args.policies else POLICIES:
                measure(cache, policy)
            del cache
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
