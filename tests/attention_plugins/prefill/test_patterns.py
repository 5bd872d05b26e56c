"""What every pattern has to keep to."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from attention_plugins.prefill import antidiagonals, base, scores
from attention_plugins.prefill.attention import dense_attention, run, sparse_attention
from attention_plugins.prefill.base import Plan
from attention_plugins.prefill.registry import BUILT_IN
from tests.attention_plugins.prefill.prompts import (
    DIM,
    FULL,
    LOOK,
    NUM_HEADS,
    NUM_KV_HEADS,
    ODD,
    SPARSE,
    Pages,
    Prompt,
    by_query_head,
    make,
    make_prompt,
)

ALL = pytest.mark.parametrize("name", [pattern.name for pattern in BUILT_IN])
LOOKING = pytest.mark.parametrize("name", LOOK)


def test_every_pattern_is_here() -> None:
    names = {pattern.name for pattern in BUILT_IN}
    assert names == set(SPARSE) == set(FULL) and set(LOOK) < names


@pytest.mark.parametrize(("name", "index"), [(name, index) for name in FULL for index in range(len(FULL[name]))])
@pytest.mark.parametrize("first", [0, 128, 517, ODD - 1])
def test_nothing_left_out_is_dense(name: str, index: int, first: int) -> None:
    prompt = make_prompt()
    chunk = prompt.chunk(first)
    pattern = make(name, **FULL[name][index])
    out, _ = run(pattern, chunk, prompt.values)
    torch.testing.assert_close(out, dense_attention(chunk, prompt.values)[0], atol=1e-5, rtol=1e-5)
    if not pattern.corrects:
        assert (pattern.plan(chunk).density() == 1).all()


@ALL
def test_sparse_settings_leave_something_out(name: str) -> None:
    density = make(name).plan(make_prompt().chunk()).density()
    assert (density < 1).all() and (density > 0).all()


@ALL
@pytest.mark.parametrize("unit", [8, 16, 128])
@pytest.mark.parametrize(
    ("first", "last"), [(0, 1), (0, 300), (0, ODD), (128, 384), (384, ODD), (77, 400), (900, 901), (131, 131 + 128)]
)
def test_forced_units_and_the_diagonal(name: str, unit: int, first: int, last: int) -> None:
    """The sink and each block's own tokens are there, nothing of the future is; whatever the lengths."""
    pattern = make(name)
    chunk = make_prompt().chunk(first, last, unit=unit)
    plan = pattern.plan(chunk)
    assert plan.mask.dtype == torch.bool
    heads = NUM_KV_HEADS if pattern.per_kv_head else NUM_HEADS
    assert plan.mask.shape == (heads, -(-(last - first) // 128), -(-last // unit))
    for block, start in enumerate(range(first, last, 128)):
        own = range(start, min(start + 128, last))
        for position in (*own, *range(min(128, start))):
            assert plan.mask[:, block, position // unit].all()
        assert not plan.mask[:, block, own[-1] // unit + 1 :].any()


@ALL
def test_cuts_at_128_change_nothing_where_it_says_so(name: str) -> None:
    pattern, prompt = make(name), make_prompt(2011)
    whole = pattern.plan(prompt.chunk()).mask
    same = True
    for cuts in ([0, 128, 640, 1664], [0, 256, 384, 512, 1024, 1152, 1920]):
        for chunk, _ in prompt.chunks(cuts):
            first = chunk.offset // 128
            mask = pattern.plan(chunk).mask
            same &= torch.equal(mask, whole[:, first : first + mask.shape[1], : mask.shape[2]])
    assert same == pattern.chunk_exact


@ALL
def test_query_heads_of_a_group_attend_to_their_own_keys(name: str) -> None:
    """A model with as many KV heads as query heads, whose keys are copies, gives the same plan."""
    prompt, pattern = make_prompt(), make(name)
    group = NUM_HEADS // NUM_KV_HEADS
    copied = Prompt(prompt.queries, *(tensor.repeat_interleave(group, 0) for tensor in (prompt.keys, prompt.values)))
    grouped = by_query_head(pattern.plan(prompt.chunk()))
    plan = pattern.plan(copied.chunk())
    assert len(plan.mask) == NUM_HEADS
    if name in {"strided", "bigbird"}:
        return  # These go by the KV heads' numbers.
    assert torch.equal(grouped, plan.mask)


@ALL
def test_reads_pages(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader instead of a tensor, and several tiles of keys."""
    prompt, pattern = make_prompt(), make(name)
    wanted = pattern.plan(prompt.chunk(512))
    for module in (base, scores, antidiagonals):
        monkeypatch.setattr(module, "TILE", 256, raising=False)
    monkeypatch.setattr(base.Chunk.tiles, "__defaults__", (256,))
    chunk = prompt.chunk(512)
    paged = replace(chunk, keys=Pages(prompt.keys))
    assert torch.equal(pattern.plan(paged).mask, wanted.mask)
    out, _ = run(pattern, paged, Pages(prompt.values))
    torch.testing.assert_close(out, run(pattern, chunk, prompt.values)[0])


@ALL
def test_decides_without_looking_at_the_gpu(name: str) -> None:
    """No number is brought to the host, neither for plans nor for corrections: tensors without contents have none."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        prompt = make_prompt()
        mask = make(name).plan(prompt.chunk(300)).mask
        out, _ = run(make(name), prompt.chunk(300), prompt.values)
    assert mask.shape[1:] == (-(-(ODD - 300) // 128), -(-ODD // 16)) and out.shape == (ODD - 300, NUM_HEADS, DIM)


@ALL
def test_same_plan_every_time(name: str) -> None:
    chunk = make_prompt().chunk()
    assert torch.equal(make(name).plan(chunk).mask, make(name).plan(chunk).mask)


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    prompt = make_prompt(400)
    chunk = Prompt(prompt.queries.to(dtype), prompt.keys.to(dtype), prompt.values.to(dtype)).chunk()
    plan = make(name).plan(chunk)
    assert sparse_attention(chunk, prompt.values.to(dtype), plan)[0].isfinite().all()


@ALL
def test_equal_queries_and_keys(name: str) -> None:
    """Nothing to choose by: something is chosen all the same, and lower positions win."""
    prompt = Prompt(torch.ones(512, NUM_HEADS, DIM), torch.ones(NUM_KV_HEADS, 512, DIM), torch.ones(2, 512, DIM))
    out, _ = run(make(name), prompt.chunk(), prompt.values)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=3e-5)


@LOOKING
@pytest.mark.parametrize("where", [300, 523, 700])
def test_finds_a_hot_column(name: str, where: int) -> None:
    """A key that all queries want is computed for all blocks behind it. HiP finds it if its neighbours are warm."""
    prompt = make_prompt(strength=0.5)
    warm = 256 if name == "hip" else 1
    prompt.queries[..., 0] = 10.0
    prompt.keys[..., 0] = 20 * (1 - (torch.arange(ODD) - where).abs() / warm).clamp(min=0)
    plan = make(name).plan(prompt.chunk())
    behind = plan.grid.first_rows > where
    assert behind.any() and plan.mask[:, behind, where // 16].all()


@LOOKING
def test_numbers_that_are_none_keep_what_they_belong_to(name: str) -> None:
    prompt, pattern = make_prompt(), make(name)
    prompt.keys[1, 600] = float("nan")
    mask = by_query_head(pattern.plan(prompt.chunk()))[NUM_HEADS // 2 :]
    blocks = slice(5, None)
    if name == "hip":  # Which tokens a search looks at depends on the others: a chunk it looks into for certain.
        prompt.keys[1, 512:768] = float("nan")
        mask = by_query_head(pattern.plan(prompt.chunk()))[NUM_HEADS // 2 :]
        blocks = slice(7, None)
    assert mask[:, blocks, 600 // 16].all()

    prompt = make_prompt()
    prompt.queries[-1] = float("nan")
    assert pattern.plan(prompt.chunk()).mask[:, -1].all()


@ALL
def test_densities_add_up(name: str) -> None:
    """A plan, and what it leaves out, are everything; so are their attentions (see `test_attention`)."""
    plan = make(name).plan(make_prompt().chunk(77))
    rest = Plan(plan.grid.visible & ~plan.mask, plan.grid)
    torch.testing.assert_close(plan.density() + rest.density(), torch.ones(len(plan.mask)))
    shared = plan.by_kv_head(NUM_KV_HEADS)
    highest = plan.density().unflatten(0, (NUM_KV_HEADS, -1)).amax(1)
    assert (shared.density() >= highest).all()


@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        ("xattention", "threshold", [0.2, 0.5, 0.8, 1.0]),
        ("flexprefill", "gamma", [0.2, 0.5, 0.8, 1.0]),
        ("minference", "vertical", [30, 60, 120]),
        ("minference", "slash", [50, 70, 100]),
        ("anchor", "theta", [3.5, 4.9, 5.1]),
        ("hip", "tokens", [128, 256, 512]),
        ("zipvl", "tau", [0.1, 0.3, 0.6, 1.0]),
        ("streaming", "window", [1, 200, 500]),
        ("power", "window", [1, 4, 6]),
        ("strided", "local", [1, 5, 17]),
        ("bigbird", "random", [0, 1, 5]),
    ],
)
def test_more_is_more(name: str, field: str, values: list[float]) -> None:
    """A larger argument computes what a smaller one does, and more."""
    chunk = make_prompt(3000).chunk()
    words = SPARSE[name] | ({"first_tokens": 2048, "second_tokens": 2048} if name == "hip" else {})
    masks = [make(name, **words | {field: value}).plan(chunk).mask for value in values]
    for less, more in pairwise(masks):
        assert (less <= more).all() and less.sum() < more.sum()


@pytest.mark.parametrize("name", [name for name in SPARSE if name != "delta"])
@pytest.mark.parametrize("last", [1, 50, 200])
@pytest.mark.parametrize("cuts", [[0], [0, 384, 896], [0, 1000]])
def test_last_rows_are_dense(name: str, last: int, cuts: list[int]) -> None:
    """And no others than those that share a block of 128 with one, wherever the prompt is cut."""
    prompt = make_prompt()
    plain, pattern = make(name), make(name, **SPARSE[name], dense_last=last)
    dense = 0
    for chunk, values in prompt.chunks(cuts):
        mask, wanted = pattern.planned(chunk).mask, plain.planned(chunk).mask
        for block, first in enumerate(chunk.grid.first_rows.tolist()):
            if first + 128 > ODD - last or (block == chunk.grid.q_blocks - 1 and chunk.k_len > ODD - last):
                assert torch.equal(mask[:, block], chunk.grid.visible[block].expand(len(mask), -1))
                dense += 1
            else:
                assert torch.equal(mask[:, block], wanted[:, block])
        out, _ = run(pattern, chunk, values)
        rows = chunk.k_len - max(ODD - last, chunk.offset)
        if rows > 0:
            torch.testing.assert_close(out[-rows:], dense_attention(chunk, values)[0][-rows:], atol=1e-5, rtol=1e-5)
    assert dense > 0


@ALL
def test_dense_below(name: str) -> None:
    pattern = make(name, **SPARSE[name])
    floor, least = (3, 32768) if name == "hip" else (0, 16384)
    assert pattern.applies(floor, least) and not pattern.applies(floor, least - 1)
    assert floor == 0 or not pattern.applies(floor - 1, least)
