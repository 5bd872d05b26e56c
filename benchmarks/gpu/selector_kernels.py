"""What the kernels of selectors take, beside FlashAttention over everything and over the same selection.

python -m benchmarks.gpu.selector_kernels [--check] [--quick]

Times are microseconds of one call inside a CUDA graph of 24, the median of its replays. The calls go over 8 layers and
24 lists, so that what one reads is not in the GPU's cache for the next, as in a model. --check compares each kernel
with its twin once, at these shapes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from attention_plugins import kernels, naive
from benchmarks.gpu.engine import say
from benchmarks.gpu.selector_cache import SELECT, FakeCache

SHAPES = [(126_000, 1), (126_000, 3), (32_000, 1), (32_000, 4), (32_000, 8)]
BUDGETS = [512, 1024, 2048, 4096]
CALLS, REPLAYS = 24, 30
Work = Callable[[int], Any]
ROWS: list[dict[str, Any]] = []


def timed(work: Work) -> float:
    """Microseconds of `work(index)`, index being the number of the call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for index in range(3):
            work(index)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(CALLS):
            work(index)
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times[5:])


def row(cache: FakeCache, what: str, work: Work, budget: int | None = None) -> None:
    named: dict[str, Any] = {"what": what, "context": cache.context, "batch": cache.batch, "budget": budget}
    try:
        named["us"] = round(timed(work), 1)
    except Exception as error:  # one kernel that doesn't run must not hide the others' times
        named["error"] = f"{type(error).__name__}: {error}"[:300]
    ROWS.append(named)
    say(**named)


class Flash:
    """FlashAttention as `attention_plugins.vllm_adapter.cuda_backend` calls it, a sequence for each row and KV head."""

    def __init__(self, cache: FakeCache) -> None:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        self.call, self.cache = flash_attn_varlen_func, cache
        n = cache.batch * cache.heads
        self.start = torch.arange(n + 1, dtype=torch.int32, device="cuda")
        self.queries = cache.queries.flatten(0, 1)
        self.out = torch.empty_like(self.queries)

    def attend(self, pages: torch.Tensor, lengths: torch.Tensor, content: torch.Tensor, longest: int) -> None:
        dim = self.cache.dim
        self.call(
            self.queries,
            content[..., :dim],
            content[..., dim:],
            out=self.out,
            max_seqlen_q=1,
            cu_seqlens_q=self.start,
            max_seqlen_k=longest,
            seqused_k=lengths,
            softmax_scale=dim**-0.5,
            causal=True,
            block_table=pages,
            num_splits=32,
            fa_version=3,
        )

    def over_pages(self, pages: torch.Tensor, lengths: torch.Tensor) -> None:
        self.attend(pages, lengths, self.cache.content, pages.shape[1] * self.cache.page)

    def over_tokens(self, slots: torch.Tensor, counts: torch.Tensor) -> None:
        """Pages of one token."""
        content = self.cache.content.view(-1, 1, 1, 2 * self.cache.dim)
        self.attend(slots.flatten(0, 1), counts.flatten(), content, slots.shape[-1])

    def stock(self, layer: int) -> None:
        """vLLM's own: a sequence for each row, its heads together."""
        cache, dim = self.cache, self.cache.dim
        blocks = cache.content.view(len(cache.layers), -1, cache.heads, cache.page, 2 * dim)[layer].transpose(1, 2)
        self.call(
            cache.queries.flatten(1, 2),
            blocks[..., :dim],
            blocks[..., dim:],
            out=self.out.view(cache.batch, -1, dim),
            max_seqlen_q=1,
            cu_seqlens_q=self.start[: cache.batch + 1],
            max_seqlen_k=cache.context,
            seqused_k=cache.rows.seq_lens,
            softmax_scale=dim**-0.5,
            causal=True,
            block_table=cache.rows.block_table,
            num_splits=32,
            fa_version=3,
        )


def whole_rows(cache: FakeCache, flash: Flash, bounds: torch.Tensor) -> None:
    """What doesn't depend on a budget."""
    rows, layers, sequences = cache.rows, cache.layers, cache.batch * cache.heads
    width = cache.rows.block_table.shape[1]
    tables = [(cache.empty(sequences, width), cache.empty(sequences)) for _ in layers]
    for layer, table in zip(layers, tables, strict=True):
        kernels.full_rows(*table, rows, layer, SELECT)
    scores, page_scores = cache.scores(cache.columns), cache.scores(cache.columns // cache.page)
    lse = torch.full((*cache.shape, cache.group), 12.0, device="cuda")
    labels = torch.randn(cache.content.shape[0] * cache.page, 32, device="cuda", dtype=torch.bfloat16)
    rotated = cache.queries[..., :32].contiguous()

    def in_turn(index: int) -> Any:
        return layers[index % len(layers)]

    row(cache, "dense, FlashAttention, stock", lambda i: flash.stock(i % len(layers)))
    row(cache, "dense, FlashAttention, a sequence for each head", lambda i: flash.over_pages(*tables[i % len(layers)]))
    row(cache, "full_rows", lambda i: kernels.full_rows(*tables[0], rows, in_turn(i), SELECT))
    row(cache, "newest_slots", lambda i: kernels.newest_slots(rows, in_turn(i)))
    row(
        cache, "token_scores, logits",
        lambda i: kernels.token_scores(scores, rows, in_turn(i), cache.queries, SELECT),
    )  # fmt: skip
    row(
        cache, "token_scores, probabilities",
        lambda i: kernels.token_scores(scores, rows, in_turn(i), cache.queries, SELECT, lse=lse, reduce="mean"),
    )  # fmt: skip
    row(
        cache, "token_scores, 32 labels",
        lambda i: kernels.token_scores(scores, rows, in_turn(i), rotated, SELECT, labels=labels),
    )  # fmt: skip
    row(
        cache, "page_scores",
        lambda i: kernels.page_scores(page_scores, bounds, rows, in_turn(i), cache.queries, SELECT),
    )  # fmt: skip


def selections(cache: FakeCache, flash: Flash, bounds: torch.Tensor, budget: int) -> None:
    """What depends on the budget, and sums of a step's calls."""
    rows, layers, n = cache.with_tokens(budget), cache.layers, cache.batch * cache.heads
    tokens, pages = cache.token_lists(budget, CALLS), cache.page_lists(budget, CALLS)
    scores, page_scores = cache.scores(cache.columns), cache.scores(cache.columns // cache.page)
    table, lengths = cache.empty(n, -(-budget // cache.page)), cache.empty(n)
    slots, counts, into = cache.empty(*cache.shape, budget + 16), cache.empty(*cache.shape), rows.places
    out, logits = torch.empty_like(cache.queries), torch.zeros(*cache.shape, budget + 16, device="cuda")
    places = torch.randint(0, cache.context, (cache.batch, 1, budget), device="cuda").int()
    one = torch.full((cache.batch, 1), budget, device="cuda", dtype=torch.int32)

    def in_turn(index: int) -> Any:
        return layers[index % len(layers)]

    def attend(i: int, *more: torch.Tensor) -> None:
        kernels.slot_attention(out, cache.queries, *tokens[i % CALLS], into, rows, in_turn(i), SELECT, *more)

    def quest(i: int) -> None:
        kernels.page_scores(page_scores, bounds, rows, in_turn(i), cache.queries, SELECT)
        kernels.top_pages(table, lengths, page_scores, rows, in_turn(i), SELECT)
        flash.over_pages(table, lengths)

    def recycled(i: int) -> None:
        kernels.append_newest(*tokens[i % CALLS], into, rows, in_turn(i), SELECT)
        attend(i, logits)
        kernels.evict_least(*tokens[i % CALLS], into, rows, logits, SELECT)

    def by_token(i: int) -> None:
        kernels.token_scores(scores, rows, in_turn(i), cache.queries, SELECT)
        kernels.top_slots(slots, counts, scores, rows, in_turn(i), SELECT, into)

    work: dict[str, Work] = {
        "top_slots": lambda i: kernels.top_slots(slots, counts, scores, rows, in_turn(i), SELECT, into),
        "top_pages": lambda i: kernels.top_pages(table, lengths, page_scores, rows, in_turn(i), SELECT),
        "place_slots": lambda i: kernels.place_slots(slots, places, one, rows, in_turn(i), SELECT),
        "slot_attention": attend,
        "slot_attention with logits": lambda i: attend(i, logits),
        "FlashAttention over the same tokens": lambda i: flash.over_tokens(*tokens[i % CALLS]),
        "FlashAttention over pages": lambda i: flash.over_pages(*pages[i % CALLS]),
        "append_newest": lambda i: kernels.append_newest(slots, counts, into, rows, in_turn(i), SELECT),
        "Quest: score, select, attend": quest,
        "Recycled, reuse: append, attend, evict": recycled,
        "tokens: score, select": by_token,
    }
    for what, one_call in work.items():
        row(cache, what, one_call, budget)


def compare(made: dict[str, list[torch.Tensor]], names: str, tolerances: dict[str, float]) -> None:
    """Say how far apart kernels and twins are, relative to numbers above 1; equal infinities are no distance."""
    for name, found, expected in zip(names.split(), made["kernel"], made["twin"], strict=True):
        far = (found.float() - expected.float()).abs() / expected.float().abs().clamp(min=1)
        most = float(torch.where(found == expected, 0.0, far).max())
        say(check=name, largest_difference=most, ok=most <= tolerances.get(name, 0.0))


def check(cache: FakeCache, budget: int) -> None:
    """Every kernel against its twin."""
    rows, layer, want = cache.with_tokens(budget), cache.layers[-1], SELECT
    n, into = cache.batch * cache.heads, rows.places
    bounds = naive.page_bounds(len(layer.pages), cache.dim, cache.device)
    naive.write_bounds(bounds, layer, cache.geometry.pages_of(layer.layer, rows.block_table[0].long()).flatten())
    bounds_2, lse = bounds.clone(), torch.randn(*cache.shape, cache.group, device=cache.device)
    made: dict[str, list[torch.Tensor]] = {}
    for name, ops in (("kernel", kernels), ("twin", naive)):
        scores, shares = cache.scores(cache.columns).zero_(), cache.scores(cache.columns).zero_()
        of_pages = cache.scores(cache.columns // cache.page).zero_()
        ops.token_scores(scores, rows, layer, cache.queries, want)
        ops.token_scores(shares, rows, layer, cache.queries, want, lse=lse, reduce="mean")
        own = bounds if name == "twin" else bounds_2
        ops.page_scores(of_pages, own, rows, layer, cache.queries, want)
        made[name] = [scores, shares, own, of_pages]
    compare(made, "logits shares bounds page_scores", {"logits": 1e-4, "shares": 1e-4, "page_scores": 1e-4})
    scores, _, _, of_pages = made["twin"]
    for name, ops in (("kernel", kernels), ("twin", naive)):
        slots, counts = cache.empty(*cache.shape, budget + 16), cache.empty(*cache.shape)
        places, width = torch.zeros_like(slots), rows.block_table.shape[1]
        table, lengths, full, full_lengths = (cache.empty(*shape) for shape in ((n, width), (n,)) * 2)
        ops.top_slots(places, counts, scores, rows, layer, want, into, as_places=True)
        ops.top_slots(slots, counts, scores, rows, layer, want, into)
        again, out = torch.zeros_like(slots), torch.zeros_like(cache.queries)
        ops.place_slots(again, places, counts, rows, layer, want)
        ops.top_pages(table, lengths, of_pages, rows, layer, want)
        ops.full_rows(full, full_lengths, rows, layer, want)
        listed, logits = slots.clone(), torch.zeros(slots.shape, device=cache.device)
        ops.append_newest(listed, counts, into, rows, layer, want)
        ops.slot_attention(out, cache.queries, listed, counts, into, rows, layer, want, logits)
        evicted, left = listed.clone(), counts.clone()
        ops.evict_least(evicted, left, into, rows, logits, want)
        newest = ops.newest_slots(rows, layer)
        made[name] = [slots, counts, places, again, table, lengths, full, full_lengths, newest, out, logits, evicted]
    names = "slots counts places placed pages page_lengths full full_lengths newest attention log_shares evicted"
    compare(made, names, {"attention": 2e-3, "log_shares": 1e-4})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the twins, and time nothing")
    parser.add_argument("--quick", action="store_true", help="two shapes and one budget")
    args = parser.parse_args()
    if args.check:
        for context, batch in ((126_000, 1), (31_993, 3)):
            check(FakeCache(context, batch, layers=2), 2048)
        return
    for context, batch in SHAPES[:1] + SHAPES[-1:] if args.quick else SHAPES:
        cache = FakeCache(context, batch)
        flash, bounds = Flash(cache), kernels.page_bounds(len(cache.layers[0].pages), cache.dim, cache.device)
        whole_rows(cache, flash, bounds)
        for budget in [2048] if args.quick else BUDGETS:
            selections(cache, flash, bounds, budget)
        del cache, flash, bounds
        torch.cuda.empty_cache()
    print(f"\n{'':66s}{'context':>9s}{'batch':>7s}{'budget':>8s}{'µs':>9s}")
    for one in ROWS:
        took = one.get("us", "failed")
        print(f"{one['what']:66s}{one['context']:9d}{one['batch']:7d}{one['budget'] or '':>8}{took:>9}")


if __name__ == "__main__":
    main()
