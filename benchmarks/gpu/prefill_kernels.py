"""What sparse prefill takes per layer and chunk: estimating, building lists, attending, beside dense attention.

python -m benchmarks.gpu.prefill_kernels [--contexts 32768,65536,126976] [--chunks 8192] [--patterns NAME,...]
    [--no-flex]
python -m benchmarks.gpu.prefill_kernels --check | --parts | --tune [KERNEL ...]

A chunk of 8,192 queries (or `--chunks`) at the end of a context, 8B shapes, bfloat16, pages of 16 tokens in random
order. Queries and keys are random: arguments are set for densities of some percent, which say nothing about real ones.
Milliseconds, the median; `plan_graph_ms` is the plan inside a CUDA graph, without the time that launches take.
`plan_share` is the eager plan by the attention, `graph_share` the one in a graph, and `under_15_percent_from` the
density from which that is at most 15 %, if attention takes as long as it has pairs. --check compares kernels with their
twins in float32 on a smaller chunk; --parts times the estimators one by one; --tune tries other sizes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import torch

from attention_plugins import kernels
from attention_plugins.kernels import prefill as ops
from attention_plugins.prefill import plain
from attention_plugins.prefill.anchor import Anchor
from attention_plugins.prefill.base import Chunk, Pattern, Plan, read
from attention_plugins.prefill.grid import ROWS
from attention_plugins.prefill.paged import PagedTokens
from attention_plugins.prefill.registry import make_pattern
from benchmarks.gpu.block_prefill import timed
from benchmarks.gpu.engine import say
from kvcache.pages import InterleavedCodec

CHUNK, PAGE, HEADS, KV_HEADS, DIM = 8192, 16, 32, 8, 128

WORDS: dict[str, dict[str, Any]] = {
    "flexprefill": {"pattern": "flexprefill", "gamma": 0.04},
    "flexprefill by columns": {"pattern": "flexprefill", "gamma": 0.04, "tau": 0.0},
    "flexprefill by means": {"pattern": "flexprefill", "gamma": 0.06, "tau": 1.0},
    "xattention 8": {"pattern": "xattention", "threshold": 0.07},
    "xattention 16": {"pattern": "xattention", "threshold": 0.07, "stride": 16},
    "xattention 32": {"pattern": "xattention", "threshold": 0.07, "stride": 32},
    "xattention 64": {"pattern": "xattention", "threshold": 0.07, "stride": 64},
    "xattention 128": {"pattern": "xattention", "threshold": 0.07, "stride": 128},
    "minference": {"pattern": "minference", "vertical": 300, "slash": 50},
    "anchor": {"pattern": "anchor"},
    "streaming": {"pattern": "streaming", "window": 6144},
    "streaming + delta": {"pattern": "delta", "base": {"pattern": "streaming", "window": 6144}},
    "hip": {"pattern": "hip"},
    "zipvl": {"pattern": "zipvl", "tau": 0.004},
}


def graphed(work: Callable[[], object]) -> float | str:
    """The same inside a CUDA graph, or what hinders it."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
    except Exception as error:
        torch.cuda.synchronize()
        return f"{type(error).__name__}: {error}"[:200]
    return timed(graph.replay)


class Case:
    """Attributes:
    chunk: of kernels.
    values: as the chunk's keys.
    content: keys and values as FlashAttention takes them, [num_pages, page, 1, 2 * head_dim].
    """

    def __init__(self, k_len: int, q_len: int = CHUNK) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        blocks = -(-k_len // PAGE)
        self.cache = torch.empty(blocks * KV_HEADS, 2 * PAGE * DIM, dtype=torch.bfloat16, device="cuda")
        self.cache.normal_(generator=generator)
        order = torch.randperm(blocks, generator=generator, device="cuda")
        self.table = order * KV_HEADS + torch.arange(KV_HEADS, device="cuda")[:, None]
        queries = torch.randn(q_len, HEADS, DIM, device="cuda", generator=generator).bfloat16()
        keys, self.values = (
            PagedTokens(
                self.cache, self.table, InterleavedCodec(PAGE, DIM), PAGE, DIM, k_len, values, torch.bfloat16
            )
            for values in (False, True)
        )  # fmt: skip
        self.chunk = Chunk(queries, keys, DIM**-0.5, unit=PAGE, prompt_len=131072, ops=ops)
        self.content = self.cache.view(-1, PAGE, 1, 2 * DIM)

    def plain(self) -> Chunk:
        """In float32, for twins."""
        keys = read(self.chunk.keys, 0, self.chunk.k_len).float()
        return replace(self.chunk, queries=self.chunk.queries.float(), keys=keys, ops=plain)

    def flash(self, queries: torch.Tensor, content: torch.Tensor, used: torch.Tensor, table: torch.Tensor) -> Any:
        """FlashAttention 3 over sequences of equally many queries."""
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        rows = len(queries) // len(used)
        starts = torch.arange(0, len(queries) + 1, rows, dtype=torch.int32, device="cuda")
        return flash_attn_varlen_func(
            queries, content[..., :DIM], content[..., DIM:], max_seqlen_q=rows, cu_seqlens_q=starts,
            max_seqlen_k=self.chunk.k_len, seqused_k=used, softmax_scale=self.chunk.scale, causal=True,
            block_table=table, fa_version=3, return_softmax_lse=True,
        )  # fmt: skip

    def dense(self) -> float:
        together = self.cache.view(-1, KV_HEADS, PAGE, 2 * DIM).transpose(1, 2)
        used = torch.tensor([self.chunk.k_len], dtype=torch.int32, device="cuda")
        table = (self.table[:1] // KV_HEADS).int()
        return timed(lambda: self.flash(self.chunk.queries, together, used, table))

    def sparse(self, plan: Plan, lists: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[q_len, num_heads, head_dim], as the queries."""
        shape = plan.grid.q_blocks, ROWS, len(plan.mask), HEADS // len(plan.mask), DIM
        split = self.chunk.queries.view(shape).permute(2, 0, 1, 3, 4).flatten(0, 2)
        out, _ = self.flash(split, self.content, lists[1], lists[0])
        return out.view(shape[2], shape[0], ROWS, shape[3], DIM).permute(1, 2, 0, 3, 4).reshape(-1, HEADS, DIM)


def tflops(lengths: torch.Tensor, group: int, ms: float) -> float:
    """Of the computed pairs; each block's own tokens are half computed."""
    pairs = int(lengths.long().sum()) * ROWS - len(lengths) * ROWS * ROWS // 2
    return round(4 * DIM * group * pairs / ms / 1e9, 1)


@cache
def causal(offset: int) -> Callable[..., torch.Tensor]:
    """One function for each offset: another one would be compiled again."""

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q + offset >= k

    return sees


@cache
def compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Else what is compiled for one context too many runs uncompiled, and asks for n x n memory.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(flex_attention, dynamic=False)


def flex(case: Case, plan: Plan) -> dict[str, Any]:
    """FlexAttention over the blocks of 128 keys that hold a unit of the plan."""
    from torch.nn.attention.flex_attention import BlockMask

    chunk = case.chunk
    held = plan.mask.repeat_interleave(HEADS // len(plan.mask), 0)
    held = (
        torch.nn.functional.pad(held, (0, -held.shape[-1] % (ROWS // PAGE))).unflatten(-1, (-1, ROWS // PAGE)).any(-1)
    )
    blocks = torch.arange(held.shape[-1], device="cuda")
    own = blocks * ROWS + ROWS - 1 >= plan.grid.first_rows[:, None]

    def listed(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = mask.int().argsort(dim=-1, descending=True, stable=True)
        return mask.sum(-1, dtype=torch.int32)[None], order.int()[None]

    mask = BlockMask.from_kv_blocks(
        *listed(held & own), *listed(held & ~own), BLOCK_SIZE=ROWS, mask_mod=causal(chunk.offset)
    )
    queries = chunk.queries.transpose(0, 1)[None].contiguous()
    keys, values = (read(source, 0, chunk.k_len)[None].contiguous() for source in (chunk.keys, case.values))
    compiled = compiled_flex()
    ms = timed(lambda: compiled(queries, keys, values, block_mask=mask, scale=chunk.scale, enable_gqa=True))
    lengths = held.sum(-1).flatten() * ROWS
    return {"flex_ms": ms, "flex_tflops": tflops(lengths, 1, ms)}


def near_tenth(case: Case, name: str) -> Pattern:
    """The pattern; anchor's reach, which depends on the data, such that a few percent are within it."""
    words = dict(WORDS[name])
    if name == "anchor":
        pattern = make_pattern(words)
        assert isinstance(pattern, Anchor)
        slack = pattern.slack(case.chunk)[..., : (case.chunk.offset - ROWS) // PAGE].flatten()[:65536]
        words["theta"] = -float(slack.quantile(0.95))
    found = make_pattern(words)
    assert found is not None
    return found


def measure(context: int, chunk: int, names: list[str], with_flex: bool) -> None:
    case = Case(context, chunk)
    dense_ms = case.dense()
    pairs = chunk * (context - chunk / 2)
    say(
        what="dense",
        context=context,
        chunk=chunk,
        ms=dense_ms,
        tflops=round(4 * DIM * HEADS * pairs / dense_ms / 1e9, 1),
    )
    for name in names:
        row: dict[str, Any] = {"what": name, "context": context, "chunk": chunk}
        try:
            pattern = near_tenth(case, name)

            def plan(pattern: Pattern = pattern) -> Plan:
                # A layer's own, with the grid that all layers share.
                return pattern.plan(replace(case.chunk, shared=case.chunk.grid))

            made = plan()
            row["density"] = round(float(made.density().mean()), 4)
            row["plan_ms"], row["plan_graph_ms"] = timed(plan), graphed(plan)
            lists = kernels.page_lists(made, case.table)
            row["lists_ms"] = timed(lambda made=made: kernels.page_lists(made, case.table))  # type: ignore[misc]
            row["attend_ms"] = timed(lambda made=made, lists=lists: case.sparse(made, lists))  # type: ignore[misc]
            row["tflops"] = tflops(lists[1], HEADS // len(made.mask), row["attend_ms"])
            row["plan_share"] = round(row["plan_ms"] / row["attend_ms"], 3)
            if isinstance(row["plan_graph_ms"], float):
                row["graph_share"] = round(row["plan_graph_ms"] / row["attend_ms"], 3)
                row["under_15_percent_from"] = round(row["density"] * row["graph_share"] / 0.15, 3)
            row["of_dense"] = round((row["plan_ms"] + row["lists_ms"] + row["attend_ms"]) / dense_ms, 3)
            # What FlexAttention is compiled for takes minutes: once for a context is enough.
            if with_flex and chunk == CHUNK:
                row |= flex(case, made)
        except Exception as error:  # one that doesn't run must not hide the others' times
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        say(**row)


def parts(context: int) -> None:
    """The estimators one by one."""
    case = Case(context)
    chunk = case.chunk
    grid = chunk.grid
    sums = ops.last_row_sums(chunk, ROWS) / ROWS
    masses = ops.antidiagonal_masses(chunk, 16)
    rows = torch.arange(CHUNK - ROWS, CHUNK, device="cuda")
    blocks = torch.rand(HEADS, grid.q_blocks, grid.k_blocks(ROWS), device="cuda") < 0.05
    tokens = torch.rand(HEADS, context, device="cuda") < 0.001
    anchors = ops.near_maxima(chunk, 2048)
    starts = torch.randint(context // 32, (1, grid.q_blocks, 1024), device="cuda") * 32
    own = torch.zeros(grid.q_blocks, grid.k_blocks(ROWS), dtype=torch.bool, device="cuda")
    work: dict[str, Callable[[], object]] = {
        "denominators of 128 rows": lambda: ops.rows.denominators(chunk, rows),
        "last_row_sums of 128": lambda: ops.last_row_sums(chunk, ROWS),
        "last_row_sums of 64": lambda: ops.last_row_sums(chunk, 64),
        "column_sums of 128": lambda: ops.column_sums(chunk, rows),
        "count_to_reach of 64 x context": lambda: ops.count_to_reach(sums, 0.9),
        "top of 64 x context": lambda: ops.top(sums, 1000),
        "top of 64 x blocks": lambda: ops.top(sums[..., : grid.k_blocks(ROWS)], 30),
        "pooled_keys": lambda: ops.pooled_keys(chunk, ROWS),
        "pooled_queries": lambda: ops.pooled_queries(chunk),
        "block_logits": lambda: ops.block_logits(chunk, ROWS),
        "antidiagonal_masses 8": lambda: ops.antidiagonal_masses(chunk, 8),
        "antidiagonal_masses 16": lambda: ops.antidiagonal_masses(chunk, 16),
        "antidiagonal_masses 64": lambda: ops.antidiagonal_masses(chunk, 64),
        "antidiagonal_masses 128": lambda: ops.antidiagonal_masses(chunk, 128),
        "cover": lambda: ops.cover(masses, 0.9, own),
        "block_plan": lambda: ops.block_plan(chunk, blocks, ROWS),
        "block_stripes": lambda: ops.block_stripes(chunk, blocks[:, 0], blocks[:, 1], blocks),
        "best_of_chunks, 1024 of 32": lambda: ops.best_of_chunks(chunk, starts, 32, 4, True),
        "near_maxima": lambda: ops.near_maxima(chunk, 2048),
        "group_slack": lambda: ops.group_slack(chunk, anchors, 2048),
        "token_stripes": lambda: ops.token_stripes(chunk, tokens, tokens),
    }
    for what, one in work.items():
        row: dict[str, Any] = {"part": what, "context": context}
        try:
            row |= {"ms": timed(one), "graph_ms": graphed(one)}
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:500]
        say(**row)


def tune(context: int, names: list[str]) -> None:
    """Other sizes of the kernels that take longest, or of those that are named."""
    chunk = Case(context).chunk
    rows = torch.arange(CHUNK - ROWS, CHUNK, device="cuda")
    anchors = ops.near_maxima(chunk, 2048)
    starts = torch.randint(context // 32, (1, chunk.grid.q_blocks, 1024), device="cuda") * 32
    tries: list[tuple[str, dict[str, Any], Callable[[], object], list[dict[str, Any]]]] = [
        ("denominators", ops.rows.DENOMINATORS, lambda: ops.rows.denominators(chunk, rows), [
            {"ROWS": m, "KEYS": n, "num_warps": warps, "num_stages": stages}
            for m, n, warps in ((64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (256, 64, 8), (256, 128, 8))
            for stages in (2, 3)
        ]),
        ("last_row_sums", ops.rows.STRIPES, lambda: ops.last_row_sums(chunk, ROWS), [
            {"MEMBERS": members, "num_warps": warps, "num_stages": stages}
            for members, warps in ((2, 4), (4, 4), (4, 8)) for stages in (2, 3, 4)
        ]),
        ("near_maxima", ops.reach.MAXIMA, lambda: ops.near_maxima(chunk, 2048), [
            {"KEYS": keys, "num_warps": warps, "num_stages": stages}
            for keys, warps in ((64, 4), (64, 8), (128, 8)) for stages in (2, 3)
        ]),
        ("group_slack", ops.reach.SLACK, lambda: ops.group_slack(chunk, anchors, 2048), [
            {"KEYS": keys, "BLOCKS": blocks, "num_warps": warps, "num_stages": stages}
            for keys, blocks, warps in ((64, 16, 4), (128, 16, 4), (128, 16, 8), (128, 32, 8)) for stages in (2, 3)
        ]),
        ("best_of_chunks", ops.search.SEARCH, lambda: ops.best_of_chunks(chunk, starts, 32, 4, True), [
            {"CHUNKS": chunks, "QUERIES": queries, "num_warps": warps, "num_stages": stages}
            for chunks, queries, warps in ((64, 128, 8), (32, 128, 4), (64, 64, 4), (64, 64, 8)) for stages in (2, 3)
        ]),
        ("antidiagonal_masses 16", ops.antidiagonals.PRODUCTS, lambda: ops.antidiagonal_masses(chunk, 16), [
            {"M": m, "N": n, "K": k, "num_warps": warps, "num_stages": stages}
            for m, n, warps in ((128, 256, 8), (128, 128, 4), (128, 128, 8), (256, 128, 8))
            for k, stages in ((64, 2), (64, 3), (64, 4), (128, 2))
        ]),
        ("antidiagonal_masses 128", ops.antidiagonals.LARGEST, lambda: ops.antidiagonal_masses(chunk, 128), [
            {"M": m, "N": n, "K": k, "num_warps": warps, "num_stages": stages}
            for m, n, warps in ((128, 128, 4), (128, 128, 8), (64, 128, 4), (128, 64, 4), (256, 64, 8), (256, 128, 8))
            for k, stages in ((64, 2), (64, 3), (64, 4), (128, 2), (128, 3))
        ]),
    ]  # fmt: skip
    for what, sizes, work, options in tries:
        if names and what not in names:
            continue
        before = dict(sizes)
        for option in options:
            sizes.update(option)
            try:
                say(tune=what, context=context, **option, ms=timed(work), graph_ms=graphed(work))
            except Exception as error:
                say(tune=what, context=context, **option, error=f"{type(error).__name__}: {error}"[:120])
        sizes.update(before)


def check() -> None:
    """Every estimator, plan and the attention of a plan against the twins."""
    from attention_plugins.naive import page_lists
    from attention_plugins.prefill.attention import sparse_attention

    for q_len, k_len in ((1024, 6144), (640, 5000 // ROWS * ROWS + 77)):
        case = Case(k_len, q_len)
        chunk, twin = case.chunk, case.plain()
        rows = torch.arange(0, q_len, 9, device="cuda")
        calls: dict[str, Callable[[Any, Chunk], torch.Tensor]] = {
            "last_row_sums": lambda module, one: module.last_row_sums(one, ROWS),
            "last_row_sums of 64": lambda module, one: module.last_row_sums(one, 64),
            "column_sums": lambda module, one, rows=rows: module.column_sums(one, rows),  # type: ignore[misc]
            "pooled_keys": lambda module, one: module.pooled_keys(one, ROWS),
            "pooled_queries": lambda module, one: module.pooled_queries(one),
            "near_maxima": lambda module, one: module.near_maxima(one, 2048),
            "antidiagonal_masses 8": lambda module, one: module.antidiagonal_masses(one, 8),
            "antidiagonal_masses 16": lambda module, one: module.antidiagonal_masses(one, 16),
        }
        for name, call in calls.items():
            found, wanted = call(ops, chunk), call(plain, twin)
            error = (found - wanted).abs().max() / wanted.abs().max()
            say(check=name, q_len=q_len, k_len=k_len, largest_error=float(error), ok=bool(error < 2e-3))
        for name in WORDS:
            pattern = near_tenth(case, name)
            found, wanted = pattern.plan(chunk).mask, pattern.plan(twin).mask
            other = float((found != wanted).float().mean() / wanted.float().mean())
            say(check=f"plan, {name}", q_len=q_len, k_len=k_len, density=round(float(wanted.float().mean()), 4),
                units_that_differ=other, ok=other < 0.02)  # fmt: skip
            plan = Plan(wanted, chunk.grid)
            (tables, lengths), (tables_2, lengths_2) = (
                one(plan, case.table) for one in (kernels.page_lists, page_lists)
            )
            used = torch.arange(tables.shape[1], device="cuda") * PAGE < lengths[:, None]
            same = torch.equal(lengths, lengths_2) and torch.equal(tables[used], tables_2[used])
            say(check=f"lists, {name}", q_len=q_len, k_len=k_len, ok=same)
            if q_len % ROWS == 0:
                out = case.sparse(plan, (tables, lengths)).float()
                values = read(case.values, 0, k_len).float()
                error = (out - sparse_attention(twin, values, plan)[0]).abs().max()
                say(check=f"attention, {name}", q_len=q_len, k_len=k_len, largest_error=float(error),
                    ok=bool(error < 2e-2))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="32768,65536,126976")
    parser.add_argument("--chunks", default=str(CHUNK), help="queries of a chunk, multiples of 128")
    parser.add_argument("--patterns", default=",".join(WORDS))
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out, which has to compile")
    parser.add_argument("--check", action="store_true", help="compare with the twins, and time nothing")
    parser.add_argument("--parts", action="store_true", help="time the estimators one by one")
    parser.add_argument("--tune", nargs="*", metavar="KERNEL", help="time other sizes of the kernels, or of these")
    args = parser.parse_args()
    contexts = [int(context) for context in args.contexts.split(",")]
    with torch.inference_mode():
        if args.check:
            check()
        for context in contexts if args.parts else []:
            parts(context)
        if args.tune is not None:
            tune(contexts[-1], args.tune)
        if not (args.check or args.parts or args.tune is not None):
            for context, chunk in product(contexts, map(int, args.chunks.split(","))):
                measure(context, chunk, args.patterns.split(","), not args.no_flex)


if __name__ == "__main__":
    main()
