"""Answers that are compacted again, over the CUDA adapter: in eager steps, graphs and chunks; what is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

from attention_plugins.vllm_adapter.runtime import BatchKind, set_runtime
from kvcache.observers.window import QueryWindow

if TYPE_CHECKING:
    from tests.attention_plugins.growing_world import GrowingWorld

MakeWorld = Callable[..., "GrowingWorld"]
SHAPES = pytest.mark.parametrize("shape", [(4, 2, False), (3, 1, True)], ids=["4q2kv", "3q1kv fp8"])


@pytest.fixture
def make_world(cuda_backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWorld]:
    from tests.attention_plugins.growing_world import GrowingWorld

    worlds: list[GrowingWorld] = []

    def make(**settings: Any) -> GrowingWorld:
        worlds.append(GrowingWorld(cuda_backend, monkeypatch.setattr, **settings))
        return worlds[-1]

    yield make
    for world in worlds:
        set_runtime(world.config, None)


def neighbours(world: GrowingWorld) -> None:
    """Six whose prompts are done: three grow (with a tail, without, with pages to spare), one was compacted once."""
    world.add("dense", 37)
    world.add("tail", 57, 2, interval=32)
    world.add("once", 49, 2)
    world.add("even", 64, 1, interval=16)
    world.add("plain", 16)
    world.add("large", 70, 3, interval=48)
    world.check(world.run({name: request.prompt_len for name, request in world.requests.items()}))


def first_blocks(world: GrowingWorld, *names: str) -> list[int]:
    slots = [world.compressor.slot(name) for name in names]
    return world.compressor.tables.first_block[[slot for slot in slots if slot is not None]].tolist()


@SHAPES
def test_compacted_again_beside_others(make_world: MakeWorld, shape: tuple[int, int, bool]) -> None:
    """Rows in another order each time; every request's table moves on by itself."""
    world = make_world(num_heads=shape[0], num_kv_heads=shape[1], fp8=shape[2])
    neighbours(world)
    names = list(world.requests)
    for number in range(45):
        names = [*names[1:], names[0]]
        world.check(world.run(dict.fromkeys(names, 1), padding=number % 3))
    assert [world.request(name).compactions for name in ("tail", "even", "once", "large")] == [2, 3, 1, 2]
    assert first_blocks(world, "tail", "even", "once", "large") == [5, 6, 3, 7]
    counts = [world.compressor.tables.counts[world.compressor.slot(name) or 0] for name in ("tail", "large")]
    assert any(len(each[:, 0].unique()) > 1 for each in counts), "layers are of equal length"


@SHAPES
def test_compacted_again_in_graphs(make_world: MakeWorld, shape: tuple[int, int, bool]) -> None:
    """The same graphs are replayed before and after each compaction: they find the tables as they are then."""
    world = make_world(num_heads=shape[0], num_kv_heads=shape[1], fp8=shape[2])
    neighbours(world)
    graphs = {kind: world.capture(kind, 8) for kind in (BatchKind.COMPACTED, BatchKind.MIXED)}
    growing = ["large", "once", "even", "tail"]
    tables = world.compressor.tables
    places = [each.data_ptr() for each in (tables.first_block, tables.counts, tables.starts, tables.blocks)]
    for number in range(20):
        world.check(world.replay(graphs[BatchKind.MIXED], world.requests))
        world.check(world.replay(graphs[BatchKind.COMPACTED], growing[number % 3 :]))
        world.check(world.run(dict.fromkeys(["tail", "plain", "large"], 1)))
    assert min(world.request(name).compactions for name in ("tail", "even", "large")) >= 2
    assert places == [each.data_ptr() for each in (tables.first_block, tables.counts, tables.starts, tables.blocks)]


@pytest.mark.parametrize(("chunk", "fp8"), [(5, False), (16, True)])
def test_several_tokens_behind_compactions(make_world: MakeWorld, chunk: int, fp8: bool) -> None:
    """A suffix, or a replay after preemption: chunks up to the next boundary, the first with the compaction itself."""
    world = make_world(fp8=fp8)
    neighbours(world)
    while world.request("tail").computed < 150:
        scheduled = {"plain": 1}
        for name in ("tail", "even", "large"):
            request = world.request(name)
            stop = min(end for end in request.boundaries if end > request.computed)
            scheduled[name] = min(chunk, stop - request.computed)
            if request.computed + scheduled[name] > 185:
                del scheduled[name]
        world.check(world.run(scheduled))
    assert world.request("tail").compactions == 4


def test_preempted_between_compactions(make_world: MakeWorld) -> None:
    """It starts again while others go on: dense, then compacted at the same boundaries, from its first on."""
    world = make_world()
    neighbours(world)
    for _ in range(60):
        world.check(world.run(dict.fromkeys(["tail", "even", "dense"], 1)))
    before, computed = first_blocks(world, "tail"), world.request("tail").computed
    world.check(world.run({"even": 1, "dense": 1}, preempted=["tail"]))
    assert world.compressor.slot("tail") is None
    ends = [*(end for end in world.request("tail").boundaries if end < computed), computed]
    for begin, end in zip([0, *ends], ends, strict=False):
        world.check(world.run({"even": 1, "tail": end - begin}))
    assert first_blocks(world, "tail") == before == [7]
    world.check(world.run({"once": 1, "tail": 1}, finished=["even"]))


# What is recorded


@pytest.mark.parametrize(
    ("prompt_len", "window", "interval", "fp8"),
    [(64, 9, 32, True), (57, 32, 32, False), (63, 16, 16, True), (50, 1, 16, False), (48, 16, 16, False)],
)
def test_queries_of_compacted_rows_are_recorded(
    make_world: MakeWorld, prompt_len: int, window: int, interval: int, fp8: bool
) -> None:
    """The last of each interval, in their places; of one that is shorter, behind a prompt's tail, all that it has."""
    world = make_world(fp8=fp8)
    world.add("dense", 20)
    world.add("other", 40, 2)
    grower = world.add("window", prompt_len, 2, window=window, interval=interval)
    world.check(world.run({"dense": 20, "other": 40}))
    world.check(world.run({"dense": 1, "window": prompt_len, "other": 1}))
    seen: list[tuple[int, int]] = []
    for _ in range(2 * interval + 2):
        before = world.compressor.observers("window")
        computed = grower.computed
        world.check(world.run({"other": 1, "window": 1, "dense": 1} if computed % 3 else {"window": 1}))
        if computed in grower.boundaries:  # compacted in this step: the window before it is closed
            (closed,) = before
            assert isinstance(closed, QueryWindow) and closed.missing == 0
            expected = grower.queries[:, closed.first : closed.end]
            assert closed.queries.dtype == expected.dtype and torch.equal(closed.queries.float(), expected.float())
            seen.append((closed.first, closed.end))
    ends = [end for end in grower.boundaries if end < grower.computed]
    firsts = [max(end - window, begin) for begin, end in zip([0, *ends], ends, strict=False)]
    assert seen == list(zip(firsts, ends, strict=True)) and len(seen) >= 3


@pytest.mark.parametrize("sizes", [[1] * 40, [20, 3, 9, 8], [7, 11, 5, 9, 8], [32, 8]], ids=str)
def test_chunks_of_compacted_rows_are_recorded(make_world: MakeWorld, sizes: list[int]) -> None:
    """Only the part of a chunk that is in the window; `check` compares the places."""
    world = make_world()
    world.add("other", 40)
    grower = world.add("window", 64, 2, window=9, interval=32)
    world.run({"other": 40})
    world.check(world.run({"other": 1, "window": 64}))
    windows = []
    recorded = []
    for size in sizes:
        world.check(world.run({"other": 1, "window": size}))
        windows += [each for each in world.compressor.observers("window") if each not in windows]
        recorded.append(world.recording)
    assert [(window.first, window.end) for window in windows] == [(87, 96), (119, 128)]
    assert [window.missing for window in windows] == [0, 3 * 9]
    total = 64
    for size, was in zip(sizes, recorded, strict=True):
        assert was == (total < 96 and total + size > 87)
        total += size
    assert grower.computed == total == 104


def test_recording_is_only_where_an_observer_looks(make_world: MakeWorld) -> None:
    """Not while the window is far, not for others' steps; steps that record nothing may be replayed by graphs."""
    world = make_world()
    neighbours(world)
    world.add("window", 48, 2, window=4, interval=16)
    world.check(world.run({"window": 40}))
    recorded = [world.recording]
    graph = world.capture(BatchKind.MIXED, 8)
    world.check(world.run({"window": 8, "dense": 1}))
    assert [*recorded, world.recording] == [False, True]
    recorded = []
    for position in range(48, 90):
        quiet = position % 16 < 12
        if quiet:
            world.check(world.replay(graph, ["dense", "window", "tail"]))
        else:
            world.check(world.run({"dense": 1, "window": 1, "tail": 1}))
        recorded.append(world.recording)
        world.check(world.run({"dense": 1, "even": 1}))
        assert not world.recording, "the one that is watched waits"
    assert recorded == [position % 16 >= 12 for position in range(48, 90)]
    assert world.request("window").compactions == 3
