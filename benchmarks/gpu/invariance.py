"""Where vLLM's batch-invariant mode leaves variance: attention and matrix products of one row, alone and beside others.

VLLM_BATCH_INVARIANT=1 python -m benchmarks.gpu.invariance

Needs no model. A request's row has the same numbers each time; only what else is in the batch changes. `differs` counts
the trials whose bits aren't those of the row alone. FlashAttention 3 picks its kernel by the longest query of the whole
batch, so a decoding row differs beside a prompt; version 2 has one order of summation, or it would differ here too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.engine import say

PAGE, TRIALS = 16, 20
DEVICE = "cuda"
HEADS = {64: (9, 3), 128: (32, 8)}
"""By head size: query heads and KV heads, of SmolLM2-135M and of Llama-3.1-8B."""
Row = tuple[torch.Tensor, int]
"""Queries [n, heads, d] and how many tokens the cache holds, these included."""


class Cache:
    """Pages of random keys and values; each row of a batch has pages of its own."""

    def __init__(self, head_dim: int, pages: int) -> None:
        self.heads, self.kv_heads = HEADS[head_dim]
        self.head_dim = head_dim
        shape = (pages, PAGE, self.kv_heads, head_dim)
        self.keys, self.values = (torch.randn(shape, device=DEVICE).bfloat16() for _ in range(2))

    def queries(self, number: int) -> torch.Tensor:
        return torch.randn(number, self.heads, self.head_dim, device=DEVICE).bfloat16()

    def attend(self, rows: list[Row], version: int) -> list[torch.Tensor]:
        """By row; the first one's pages are the first, whatever else is there."""
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        lengths = [length for _, length in rows]
        table = torch.zeros(len(rows), -(-max(lengths) // PAGE), dtype=torch.int32, device=DEVICE)
        used = 0
        for row, length in enumerate(lengths):
            needed = -(-length // PAGE)
            table[row, :needed] = torch.arange(used, used + needed)
            used += needed
        assert used <= len(self.keys)
        numbers = [len(queries) for queries, _ in rows]
        starts = torch.tensor([0, *numbers], device=DEVICE).cumsum(0, dtype=torch.int32)
        out = flash_attn_varlen_func(
            torch.cat([queries for queries, _ in rows]), self.keys, self.values, max_seqlen_q=max(numbers),
            cu_seqlens_q=starts, max_seqlen_k=max(lengths), causal=True, block_table=table, fa_version=version,
            seqused_k=torch.tensor(lengths, dtype=torch.int32, device=DEVICE), num_splits=1,
            softmax_scale=self.head_dim**-0.5, softcap=0.0,
        )  # fmt: skip
        return list(out.split(numbers))


def batches(cache: Cache) -> dict[str, Callable[[torch.Tensor, int], list[Row]]]:
    """What stands beside one decoding row."""

    def beside(number: int, new: int) -> Callable[[torch.Tensor, int], list[Row]]:
        return lambda query, length: [(query, length), *((cache.queries(new), 500 + new) for _ in range(number))]

    return {"100 decoding": beside(100, 1), "a chunk of 8": beside(1, 8), "a prompt of 500": beside(1, 500)}


def attention(version: int, head_dim: int) -> None:
    cache = Cache(head_dim, 8000)
    differs = dict.fromkeys([*batches(cache), "as the last of a prompt", "prompt in two chunks"], 0)
    for trial in range(TRIALS):
        length = 300 + 331 * trial
        queries = cache.queries(200)
        last = queries[-1:]
        (alone,) = cache.attend([(last, length)], version)
        for name, make in batches(cache).items():
            differs[name] += not torch.equal(cache.attend(make(last, length), version)[0], alone)
        (whole,) = cache.attend([(queries, length)], version)
        differs["as the last of a prompt"] += not torch.equal(whole[-1:], alone)
        (half,) = cache.attend([(queries[:100], length - 100)], version)
        differs["prompt in two chunks"] += not torch.equal(whole[:100], half)
    say(attention=version, head_dim=head_dim, trials=TRIALS, differs=differs)


def products(hidden: int, width: int) -> None:
    """A linear layer as vLLM computes it in batch-invariant mode."""
    from vllm.model_executor.determinism.batch_invariant import linear_batch_invariant

    weight = torch.randn(width, hidden, device=DEVICE).bfloat16()
    rows = torch.randn(2048, hidden, device=DEVICE).bfloat16()
    alone = linear_batch_invariant(rows[:1], weight)
    differs = {n: not torch.equal(linear_batch_invariant(rows[:n], weight)[:1], alone) for n in (2, 16, 100, 500, 2048)}
    say(linear=(hidden, width), differs=differs)


def versions() -> list[int]:
    from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

    return [version for version in (2, 3) if is_fa_version_supported(version)]


@torch.inference_mode()
def main() -> None:
    from vllm import envs
    from vllm.model_executor.determinism.batch_invariant import init_batch_invariance

    init_batch_invariance()
    torch.manual_seed(0)
    found: dict[str, Any] = {"batch_invariant": envs.VLLM_BATCH_INVARIANT, "device": torch.cuda.get_device_name()}
    say(**found)
    for version in versions():
        for head_dim in HEADS:
            attention(version, head_dim)
    for hidden, width in ((576, 960), (576, 3072), (1536, 576), (576, 49152), (4096, 6144)):
        products(hidden, width)


if __name__ == "__main__":
    main()
