"""The attention part of a decode step, by selector and K, beside vLLM's: all layers of 8B shapes in one CUDA graph.

python -m benchmarks.gpu.reading [--shapes 126000x1,126000x3,32000x1,32000x4,32000x8] [--budgets 512,1024,2048,4096]

No engine: the readers themselves on a cache of random keys (which page or token is read costs the same), and
FlashAttention 3 as stock vLLM calls it. Milliseconds, medians of replays. A recycled step is timed full and reused;
its average over a stride is the mean of one full step and stride - 1 others. `local` is timed with all heads near and
with none.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from attention_plugins import kernels
from attention_plugins.decode.base import Buffers, Place, Reader
from attention_plugins.decode.loki import BASIS
from attention_plugins.decode.registry import selectors
from attention_plugins.decode.rows import DecodeRows, Mode
from benchmarks.gpu.capacity import parse_shape
from benchmarks.gpu.engine import say
from benchmarks.gpu.selector_cache import FakeCache
from benchmarks.gpu.selector_kernels import Flash

LAYERS, REPLAYS, RANK = 32, 12, 32
STRIDES = (10, 50)
BUDGETS = [512, 1024, 2048, 4096]
SHAPES = "126000x1,126000x3,32000x1,32000x4,32000x8"


def timed(work: Callable[[], Any]) -> float:
    """Milliseconds of a replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:])


def flash_pages(cache: FakeCache) -> Any:
    """The adapter's attention over page tables, for layers that exist only here."""
    from attention_plugins.vllm_adapter.cuda_backend import CUDACompressedImpl, FlashPages

    impl = CUDACompressedImpl.__new__(CUDACompressedImpl)
    impl.pages, impl.page_size, impl.head_size = cache.layers[0].pages, cache.page, cache.dim
    impl.kv_cache_dtype, impl.scale, impl.logits_soft_cap = "auto", cache.layers[0].scale, 0
    impl.vllm_flash_attn_version, impl.batch_invariant_enabled, impl.max_num_splits = 3, False, 32
    return FlashPages([SimpleNamespace(impl=impl)] * LAYERS, cache.batch * cache.heads)


def place_of(cache: FakeCache) -> Place:
    return Place(
        cache.geometry,
        num_pages=len(cache.layers[0].pages),
        group=cache.group,
        dtype=torch.bfloat16,
        device=cache.device,
        rows=cache.batch,
        states=cache.batch + 1,
        width=cache.rows.block_table.shape[1],
        capacity=cache.columns + cache.page,
        calibration={BASIS: torch.randn(LAYERS, cache.heads, cache.dim, RANK)},
    )


def steps(name: str, rows: DecodeRows) -> Iterator[tuple[str, DecodeRows, int]]:
    """Kinds of steps of a selector: a name, its rows, and what `Reader.whole` says of them."""
    if name == "recycled":
        yield "full", rows, 1
        yield "reuse", replace(rows, modes=torch.full_like(rows.modes, int(Mode.REUSE))), 0
    elif name == "local":
        yield "all near", replace(rows, thresholds=torch.zeros_like(rows.thresholds)), 1
        yield "all far", replace(rows, thresholds=torch.full_like(rows.thresholds, 2.0)), 1
    else:
        yield "", rows, 0


def prepare(reader: Reader, cache: FakeCache) -> None:
    """Show every request's pages, as before its first step: how long a choice takes depends on the scores."""
    held = torch.full((LAYERS, cache.heads), cache.context)
    for row, blocks in enumerate(cache.rows.block_table.long()):
        pages = torch.stack([cache.geometry.pages_of(layer, blocks) for layer in range(LAYERS)])
        reader.prepare(pages, held, cache.layers, row)


def read_all(reader: Reader, cache: FakeCache, out: torch.Tensor, rows: DecodeRows, whole: int) -> None:
    for layer in cache.layers:
        reader.read(out, cache.queries, rows, layer, whole)


def dense_all(flash: Flash) -> None:
    for layer in range(LAYERS):
        flash.stock(layer)


def measure(context: int, batch: int, budgets: list[int], names: list[str]) -> None:
    cache = FakeCache(context, batch, layers=LAYERS)
    flash, place, out = Flash(cache), place_of(cache), torch.empty_like(cache.queries)
    dense = timed(partial(dense_all, flash))
    say(context=context, batch=batch, selector="dense", ms=round(dense, 3))
    buffers, read_pages = Buffers.make(place), flash_pages(cache)
    for name in names:
        reader = selectors()[name].reader(place, buffers, kernels, read_pages)
        if selectors()[name].prepares:
            prepare(reader, cache)
        for budget in budgets:
            rows, times = cache.with_tokens(budget), dict[str, float]()
            for kind, kind_rows, whole in steps(name, rows):
                times[kind] = timed(partial(read_all, reader, cache, out, kind_rows, whole))
                say(
                    context=context, batch=batch, selector=name, kind=kind, tokens=budget,
                    ms=round(times[kind], 3), faster=round(dense / times[kind], 2),
                )  # fmt: skip
            for stride in STRIDES if name == "recycled" else ():
                mean = (times["full"] + (stride - 1) * times["reuse"]) / stride
                say(
                    context=context, batch=batch, selector=name, kind=f"mean over a stride of {stride}", tokens=budget,
                    ms=round(mean, 3), faster=round(dense / mean, 2),
                )  # fmt: skip
        del reader
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="CONTEXTxBATCH by commas")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--selectors", nargs="+", default=list(selectors()))
    args = parser.parse_args()
    with torch.inference_mode():
        for context, batch in map(parse_shape, args.shapes.split(",")):
            torch.cuda.empty_cache()
            measure(context, batch or 1, [int(k) for k in args.budgets.split(",")], args.selectors)


if __name__ == "__main__":
    main()
