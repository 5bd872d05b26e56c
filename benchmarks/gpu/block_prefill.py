"""Sparse prefill without a kernel of ours: FlashAttention 3, each (query block, head) a sequence whose page table lists
only the key blocks that it reads.

python -m benchmarks.gpu.block_prefill [--contexts 32768,131072] [--densities 0.05,0.1]

One chunk of 8,192 queries at the end of a context, 8B shapes, one layer, pages of 16 tokens in random order. TFLOP/s
count the computed blocks alone. Lists of one KV head serve its four query heads, or each query head has its own.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from benchmarks.gpu.engine import say

CHUNK, BLOCK, PAGE, HEADS, KV_HEADS, DIM = 8192, 128, 16, 32, 8, 128
REPEATS = 10


def timed(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Milliseconds, the median."""
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return round(statistics.median(times[2:]), 4)


def lists(context: int, density: float, heads: int, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Page tables of (query block, head) sequences, their lengths, and how many key blocks they have in all.

    Args:
        pages: int32 [KV_HEADS, context / PAGE].
    """
    per_block, first = BLOCK // PAGE, (context - CHUNK) // BLOCK
    wanted = max(2, round(density * context / BLOCK))
    tables = torch.zeros(CHUNK // BLOCK, heads, wanted * per_block, dtype=torch.int32, device="cuda")
    for block in range(CHUNK // BLOCK):
        own = first + block
        weights = torch.rand(heads, own, device="cuda")
        chosen = weights.topk(wanted - 1).indices.sort(-1).values  # the diagonal comes last
        chosen = torch.cat([chosen, torch.full((heads, 1), own, device="cuda")], 1)
        at = (chosen[..., None] * per_block + torch.arange(per_block, device="cuda")).flatten(1)
        source = pages.repeat_interleave(heads // KV_HEADS, 0)
        tables[block] = source.gather(1, at)
    lengths = torch.full((tables.shape[0] * heads,), wanted * BLOCK, dtype=torch.int32, device="cuda")
    return tables.flatten(0, 1), lengths, wanted * CHUNK // BLOCK


def measure(context: int, densities: list[float]) -> None:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    blocks = context // PAGE
    cache = torch.randn(blocks * KV_HEADS, PAGE, 2 * DIM, device="cuda").bfloat16()
    table = torch.randperm(blocks, device="cuda").int()
    pages = table[None] * KV_HEADS + torch.arange(KV_HEADS, device="cuda", dtype=torch.int32)[:, None]
    queries = torch.randn(CHUNK, HEADS, DIM, device="cuda").bfloat16()
    flops = 4 * DIM * HEADS

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, used: torch.Tensor,
               block_table: torch.Tensor, longest_q: int, longest_k: int) -> object:  # fmt: skip
        return flash_attn_varlen_func(
            q, k, v, max_seqlen_q=longest_q, cu_seqlens_q=starts, max_seqlen_k=longest_k, seqused_k=used,
            softmax_scale=DIM**-0.5, causal=True, block_table=block_table, fa_version=3, return_softmax_lse=True,
        )  # fmt: skip

    together = cache.view(blocks, KV_HEADS, PAGE, 2 * DIM).transpose(1, 2)
    one = torch.tensor([0, CHUNK], dtype=torch.int32, device="cuda")
    used = torch.tensor([context], dtype=torch.int32, device="cuda")
    ms = timed(
        lambda: attend(queries, together[..., :DIM], together[..., DIM:], one, used, table[None], CHUNK, context)
    )
    pairs = CHUNK * (context - CHUNK / 2)
    say(what="dense, stock", context=context, ms=round(ms, 3), tflops=round(flops * pairs / ms / 1e9, 1))

    apart = cache.view(blocks * KV_HEADS, PAGE, 1, 2 * DIM)
    for density in densities:
        for heads, name in ((KV_HEADS, "lists by KV head"), (HEADS, "lists by query head")):
            tables, lengths, key_blocks = lists(context, density, heads, pages)
            shape = (CHUNK // BLOCK, BLOCK, heads, HEADS // heads, DIM)
            starts = torch.arange(0, len(lengths) * BLOCK + 1, BLOCK, dtype=torch.int32, device="cuda")

            def run(
                shape: tuple[int, ...] = shape, starts: torch.Tensor = starts, tables: torch.Tensor = tables,
                lengths: torch.Tensor = lengths, key_blocks: int = key_blocks,
            ) -> None:  # fmt: skip
                split = queries.view(shape).transpose(1, 2).flatten(0, 2)
                attend(
                    split,
                    apart[..., :DIM],
                    apart[..., DIM:],
                    starts,
                    lengths,
                    tables,
                    BLOCK,
                    int(tables.shape[1]) * PAGE,
                )

            ms = timed(run)
            # Each of the diagonal's blocks is half computed.
            pairs = (key_blocks - CHUNK // BLOCK / 2) * BLOCK * BLOCK
            say(
                what=f"FlashAttention 3, {name}", context=context, density=density, ms=round(ms, 3),
                tflops=round(flops * pairs / ms / 1e9, 1),
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="32768,131072")
    parser.add_argument("--densities", default="0.05,0.1")
    args = parser.parse_args()
    with torch.inference_mode():
        for context in map(int, args.contexts.split(",")):
            measure(context, [float(density) for density in args.densities.split(",")])


if __name__ == "__main__":
    main()
