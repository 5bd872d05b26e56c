"""Plans on FlashAttention: what the plan says, in batches of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attention_plugins import kernels, naive
from attention_plugins.prefill import attention as by_hand
from attention_plugins.prefill import plain
from attention_plugins.prefill.base import Chunk, Plan
from attention_plugins.prefill.registry import make_pattern, patterns
from attention_plugins.vllm_adapter import cuda_prefill
from tests.attention_plugins.cuda_world import PAGE, SCALE, Request, Step, World

MAX_LEN = 768
XATTENTION = {"pattern": "xattention", "threshold": 0.3, "min_context": 0}
STREAMING = {"pattern": "streaming", "sinks": 16, "window": 16, "min_context": 0}
DELTA = {"pattern": "delta", "gamma": 24, "base": STREAMING}


def planned(world: World, request: Request, cuts: list[int]) -> list[torch.Tensor]:
    """By layer, the whole prompt's outputs in plain torch, cut into chunks that end there."""
    found = []
    for layer, scales in enumerate(world.scales):
        pattern, carry, outs = make_pattern(request.pattern), None, []
        assert pattern is not None
        for first, last in zip([0, *cuts], cuts, strict=False):
            chunk = Chunk(
                (request.queries[layer, first:last].float() * scales.query).to(world.dtype),
                (request.keys[layer, :, :last].float() * scales.key).to(world.dtype),
                SCALE,
                PAGE,
                layer,
                request.prompt_len,
            )
            values = request.values[layer, :, :last].float() * scales.value
            if pattern.applies(layer, last):
                out, carry = by_hand.run(pattern, chunk, values, carry)
            else:
                out = by_hand.dense_attention(chunk, values)[0]
            outs.append(out.float())
        found.append(torch.cat(outs))
    return found


def check(world: World, step: Step, cuts: dict[str, list[int]]) -> None:
    atol, rtol = (0.03, 0.03) if world.fp8 else (1e-5, 1e-4)
    for request, first, last, rows in step.tokens():
        if request.pattern and first < request.prompt_len:
            wanted = planned(world, request, cuts[request.name])
        else:
            wanted = [torch.empty(0)] * len(world.layers)
        for layer, output in enumerate(step.outputs):
            expected = wanted[layer][first:last] if len(wanted[layer]) else world.expected(layer, request, first, last)
            torch.testing.assert_close(output[rows].float(), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("pattern", [XATTENTION, STREAMING, DELTA], ids=lambda words: words["pattern"])
@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_prompts_in_chunks_beside_others(make_world: Callable[..., World], pattern: dict[str, Any], fp8: bool) -> None:
    """A prompt with a pattern, another without, a compacted request that decodes, in one batch."""
    world = make_world(fp8=fp8, max_len=MAX_LEN)
    world.add("short", 40, kept_pages=1)
    world.add("dense", 300)
    sparse = world.add("sparse", 650)
    sparse.pattern = pattern
    cuts = {"sparse": [256, 512, 650]}
    check(world, world.run({"short": 40}), cuts)
    check(world, world.run({"short": 1, "dense": 100, "sparse": 256}), cuts)
    check(world, world.run({"short": 1, "sparse": 256, "dense": 100}), cuts)
    assert world.runtime.prefilling.prompts
    check(world, world.run({"short": 1, "sparse": 138}, padding=3), cuts)
    (report,) = [report.finish() for report in world.runtime.take_reports() if not hasattr(report, "_watch")]
    assert report.tokens == 650 and report.pattern == pattern["pattern"]
    assert all(0.2 < density < 1 for density in report.density)
    assert not world.runtime.prefilling.prompts
    check(world, world.run({"sparse": 1, "short": 1, "dense": 1}), cuts)


def test_rows_that_delta_attends_are_counted(make_world: Callable[..., World]) -> None:
    """Every 32nd instead of every 64th: the plan is the same, and so are the last rows, which are dense."""
    found = []
    for gamma in (64, 32):
        world = make_world(max_len=MAX_LEN)
        world.add("sparse", 650).pattern = {**DELTA, "gamma": gamma}
        unit = world.runtime.prefilling.unit
        for tokens in (256, 256, 138):
            world.run({"sparse": tokens})
        (report,) = [report.finish() for report in world.runtime.take_reports() if not hasattr(report, "_watch")]
        found.append(report)
    few, many = found
    rows = sum(row // unit + 1 for row in range(32, 512, 64)) / 128
    for less, more in zip(few.density, many.density, strict=True):
        assert (more - less) * few.pairs == pytest.approx(rows, rel=1e-3)


def test_the_first_chunk_alone_and_a_last_one_of_one_token(make_world: Callable[..., World]) -> None:
    world = make_world(max_len=MAX_LEN)
    sparse = world.add("sparse", 513)
    sparse.pattern = XATTENTION
    cuts = {"sparse": [512, 513]}
    step = world.run({"sparse": 512})
    assert step.dense == [None] * len(world.layers)
    check(world, step, cuts)
    with world.step({"sparse": 1}) as rows:
        assert world.runtime.wanted is None and world.runtime.kind == "sparse"  # no FULL graph takes it for a decode
        check(world, world.ran(rows), cuts)


def test_preempted_and_aborted_prompts_are_forgotten(make_world: Callable[..., World]) -> None:
    world = make_world(max_len=MAX_LEN)
    for name in ("one", "two"):
        world.add(name, 600).pattern = XATTENTION
    world.run({"one": 256, "two": 256})
    with world.step({}, preempted=["one"], finished=["two"]):
        pass
    assert not world.runtime.prefilling.prompts
    check(world, world.run({"one": 512}), {"one": [512, 600]})
    assert [report.finish() for report in world.runtime.take_reports()] == []


@pytest.mark.parametrize("rooms", [1 << 24, 400, 1])
def test_heads_in_rounds(make_world: Callable[..., World], monkeypatch: pytest.MonkeyPatch, rooms: int) -> None:
    """However little room page tables have."""
    monkeypatch.setattr(cuda_prefill, "TABLE_ENTRIES", rooms)
    world = make_world(max_len=MAX_LEN)
    world.add("sparse", 700).pattern = XATTENTION
    check(world, world.run({"sparse": 700}), {"sparse": [700]})


@pytest.mark.parametrize("offset, q_len", [(0, 300), (256, 256), (261, 300), (300, 1)])
@pytest.mark.parametrize("heads", [2, 4])
def test_any_plan_at_any_offset(make_world: Callable[..., World], offset: int, q_len: int, heads: int) -> None:
    world, k_len = make_world(max_len=MAX_LEN), offset + q_len
    request = world.add("sparse", k_len)
    request.pattern = XATTENTION
    if offset:
        world.run({"sparse": offset})
    with world.step({"sparse": q_len}) as rows:
        prefilling = world.runtime.prefilling
        _, (piece,) = prefilling.apart(world.common(rows), ["sparse"])
        for layer, own in enumerate(world.layers):
            queries = request.queries[layer, offset:k_len]
            keys, values = (prefilling._tokens(own.impl.cache, piece, which) for which in (False, True))
            chunk = Chunk(queries, keys, SCALE, PAGE, layer)
            plan = Plan.forced(torch.rand(heads, chunk.grid.q_blocks, chunk.grid.k_units) < 0.2, chunk.grid)
            unpaged = Chunk(queries, request.keys[layer, :, :k_len], SCALE, PAGE, layer)
            plain_values, at = request.values[layer, :, :k_len], torch.arange(0, q_len, 7)
            for ops in (naive, kernels):
                executor = cuda_prefill.FlashExecutor(world.layers, ops, plain)
                out = executor.attend(queries, chunk, values, plan)
                torch.testing.assert_close(
                    out, by_hand.sparse_attention(unpaged, plain_values, plan)[0], atol=1e-5, rtol=1e-4
                )
                dense = executor.dense_rows(queries, chunk, values, at)
                torch.testing.assert_close(dense, by_hand.dense_rows(unpaged, plain_values, at), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_warming_up_goes_through_every_pattern(make_world: Callable[..., World], fp8: bool) -> None:
    """Over a cache that holds nothing yet."""
    world = make_world(max_len=1100, fp8=fp8)
    queries = torch.float8_e4m3fn if fp8 else torch.float32
    world.runtime.prefilling.warm_up(list(patterns()), 300, 1100, world.num_heads, queries)
    assert not world.runtime.prefilling.prompts and not world.runtime.take_reports()


def test_memory_is_counted_for_the_longest_prompt() -> None:
    few, many = (cuda_prefill.nbytes(32, 8192, length, 16) for length in (32768, 1 << 20))
    assert few == 12 * 32 * 64 * 2048
    assert many == 4 * (1 << 24) + 8 * 32 * 64 * 65536
