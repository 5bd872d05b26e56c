"""Selectors in the CUDA adapter against brute force over what their formulas read, outside and inside graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

from attention_plugins import naive
from attention_plugins.decode.registry import selectors
from attention_plugins.decode.rows import Mode
from attention_plugins.naive.paged_attention import read_pages as naive_pages
from attention_plugins.vllm_adapter.runtime import BatchKind, set_runtime
from attention_plugins.vllm_adapter.selection import Selection
from tests import naive_flash

if TYPE_CHECKING:
    from tests.attention_plugins.cuda_world import Graph, Step
    from tests.attention_plugins.selector_world import SelectorWorld

Make = Callable[..., "SelectorWorld"]
CASES = ["recycled", "recycled-turning", "tidal", "tidal-shared", "lessismore", "quest", "loki", "local"]
EACH = pytest.mark.parametrize("case", CASES)
CACHES = pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])


@pytest.fixture
def make(cuda_backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    from tests.attention_plugins.selector_world import SelectorWorld

    worlds: list[SelectorWorld] = []

    def made(ops: ModuleType = naive, **settings: object) -> SelectorWorld:
        worlds.append(SelectorWorld(cuda_backend, monkeypatch.setattr, ops, **settings))
        return worlds[-1]

    yield made
    for world in worlds:
        set_runtime(world.config, None)


def check(world: SelectorWorld, step: Step) -> None:
    """Outputs of a step, and that only rows which read everything are the dense path's."""
    rtol = 2**-8 if world.fp8 else 1e-4
    in_graph = any(selected.tokens is None for selected in step.metadata.selected)
    apart = [request.compacted or request.name in world.reads for request, _, _ in step.rows]
    for layer, (output, dense) in enumerate(zip(step.outputs, step.dense, strict=True)):
        if world.reads:
            assert (dense is None) == (in_graph or all(apart))
        for request, first, last, rows in step.tokens():
            expected = world.expected(layer, request, first, last)
            torch.testing.assert_close(output[rows].float(), expected, rtol=rtol, atol=1e-5)


def everybody(world: SelectorWorld, case: str) -> list[str]:
    """Dense, compacted and selecting requests, their prompts done; the last one is both, where that goes."""
    from tests.attention_plugins.selector_world import COMPACTED

    world.add("dense", 40)
    world.add("packed", 74, 2)
    world.ask("one", case, 95)
    world.ask("two", case, 113)
    world.ask("both", case, 90, 5 if case in COMPACTED else None)
    check(world, world.run({name: request.prompt_len for name, request in world.requests.items()}))
    return list(world.requests)


class Seen:
    """What steps have been, so that no test is about less than it says."""

    def __init__(self) -> None:
        self.modes, self.kinds = set[Mode](), set[Selection | None]()
        self.parts = self.wholes = 0

    def note(self, world: SelectorWorld, step: Step, graphs: dict[Any, Graph] | None = None) -> None:
        check(world, step)
        used = [kind for kind, graph in (graphs or {}).items() if graph.metadata is step.metadata]
        self.kinds |= set(used) or {None}
        self.modes |= {read.mode for read in world.reads.values()}
        for seen in world.seen.values():
            read = seen.sum(-1) < (32 + 3 * 16)  # K, in whole pages, and the first of them
            self.parts, self.wholes = self.parts + int(read.sum()), self.wholes + int((~read).sum())

    def all_of(self, case: str) -> None:
        """Whether everything that this case may come to has come."""
        assert self.parts and (self.wholes or case == "loki"), "Loki alone reads few in every layer"
        expected = {Mode.SELECT}
        if case == "recycled":
            expected = {Mode.SELECT, Mode.REUSE}
        elif case == "recycled-turning":
            expected = {Mode.SELECT | Mode.CHECK, Mode.REUSE, Mode.CHECK}
        assert self.modes == expected


# Outside of graphs


@EACH
@CACHES
def test_steps_outside_of_graphs(make: Make, case: str, fp8: bool) -> None:
    """Through page boundaries of all rows, in ever other orders, tokens of padding behind them."""
    world, seen = make(fp8=fp8), Seen()
    names = everybody(world, case)
    for number in range(20):
        names = names[1:] + names[:1]
        seen.note(world, world.run(dict.fromkeys(names, 1), padding=number % 3))
    seen.all_of(case)


@EACH
def test_prompts_beside_selecting_rows(make: Make, case: str) -> None:
    """And rows that wait for some steps."""
    world, seen = make(), Seen()
    everybody(world, case)
    world.ask("late", case, 80)
    for scheduled in (
        {"one": 1, "late": 30, "both": 1, "packed": 1},
        {"dense": 7, "two": 1, "one": 1, "late": 49},
        {"late": 1, "both": 1},  # its prompt's last token: all is read
        {"both": 1, "late": 1, "dense": 1, "two": 1},
        {"one": 1, "late": 1},
        {"packed": 3, "late": 1, "one": 1, "both": 1},
    ):
        seen.note(world, world.run(scheduled))
        assert ("late" in world.reads) == (world.requests["late"].computed > 80)
    assert seen.parts and seen.kinds == {None}


def test_several_selectors_in_a_step(make: Make) -> None:
    """Each has its rows, scores and lists, and none disturbs the others."""
    world = make()
    for number, case in enumerate(CASES[:6]):
        world.ask(case, case, 70 + 9 * number)
    world.add("dense", 33)
    names = list(world.requests)
    check(world, world.run({name: request.prompt_len for name, request in world.requests.items()}))
    for _ in range(8):
        names = names[2:] + names[:2]
        with world.step(dict.fromkeys(names, 1)) as rows:
            assert world.runtime.kind is BatchKind.SELECTED and world.runtime.wanted is None
            check(world, world.ran(rows))
        assert len(world.reads) == 6


@EACH
def test_preempted_requests_choose_anew(make: Make, case: str) -> None:
    """Other requests get their pages and states meanwhile."""
    world, seen = make(), Seen()
    names = everybody(world, case)
    for _ in range(3):
        seen.note(world, world.run(dict.fromkeys(names, 1)))
    world.ask("new", case, 99)
    seen.note(world, world.run({"new": 99, "two": 1}, preempted=["both"], finished=["one"]))
    seen.note(world, world.run({"new": 1, "both": 93, "two": 1}))
    for _ in range(3):
        seen.note(world, world.run({"both": 1, "new": 1, "dense": 1, "two": 1}))
        assert set(world.reads) == {"both", "new", "two"}


def test_too_many_rows_are_read_whole(make: Make) -> None:
    """Seven requests ask for what six have room for."""
    world = make()
    for number in range(7):
        world.ask(f"{number}", "recycled", 64 + number)
    world.run({name: request.prompt_len for name, request in world.requests.items()})
    for _ in range(3):
        check(world, world.run(dict.fromkeys(world.requests, 1)))
        assert set(world.reads) == set("012345")
    check(world, world.run(dict.fromkeys("6543210", 1)))
    assert set(world.reads) == set("012345"), "states are kept"
    check(world, world.run(dict.fromkeys("012456", 1), finished=["3"]))
    assert set(world.reads) == set("012456")


def test_quest_has_one_way_to_read_pages_in_batch_invariant_mode(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone it would read short lists by a kernel of its own, beside dense requests by FlashAttention."""
    world = make()
    for layer, cache in zip(world.layers, world.runtime.selecting.caches, strict=True):
        layer.impl.cache = replace(cache, invariant=True)
    monkeypatch.delattr(world.runtime.selecting.readers["quest"].ops, "page_attention")
    world.ask("one", "quest", 95)
    world.run({"one": 95})
    check(world, world.run({"one": 1}))
    assert set(world.reads) == {"one"}


# Graphs


@EACH
@CACHES
def test_graphs(make: Make, case: str, fp8: bool) -> None:
    """Batches of other rows, orders and sizes from step to step, and of requests that select nothing."""
    world, seen, selector = make(fp8=fp8), Seen(), case.split("-")[0]
    names = everybody(world, case)
    graphs = world.capture_all(selector, 6)
    for _ in range(10):
        names = names[1:] + names[:1]
        seen.note(world, world.decode(names, graphs), graphs)
    for few in (["two", "both"], ["one"], ["both", "one", "two"], ["two", "one"]) * 2:
        seen.note(world, world.decode(few, graphs), graphs)
    seen.all_of(case)
    answers = {1} if selector == "local" else {0, 1, 2} if case == "recycled-turning" else {0, 1}
    assert seen.kinds == {Selection(selector, whole) for whole in answers}


@EACH
def test_graphs_and_other_steps_in_turn(make: Make, case: str) -> None:
    """All that is remembered is in both; what a step leaves in the buffers is nobody's."""
    world, seen = make(), Seen()
    names = everybody(world, case)
    graphs = world.capture_all(case.split("-")[0], 6)
    world.ask("late", case, 60)
    for number in range(4):
        seen.note(world, world.decode(names, graphs), graphs)
        seen.note(world, world.run({"late": 15, "two": 1, "packed": 1, "both": 1}))
        seen.note(world, world.decode(["packed", "dense"] if number % 2 else ["packed"], graphs), graphs)
    seen.note(world, world.decode(["late", *names[1:]], graphs, preempted=["dense"]), graphs)
    assert {type(kind) for kind in seen.kinds} == {Selection, BatchKind, type(None)}


def test_a_graph_without_rows_that_read_everything(make: Make) -> None:
    """Recycled rows alone, between two choices: not even page tables are written."""
    world = make()
    world.ask("one", "recycled", 95)
    world.run({"one": 95})
    graphs = world.capture_all("recycled", 2)
    kinds = []
    for _ in range(9):
        step = world.decode(["one"], graphs)
        check(world, step)
        kinds += [kind.whole for kind, graph in graphs.items() if graph.metadata is step.metadata]
    assert kinds == [True, False, False, False] * 2 + [True]


@CACHES
@EACH
def test_all_that_a_graph_reads_stays(
    make: Make, cuda_backend: ModuleType, monkeypatch: pytest.MonkeyPatch, case: str, fp8: bool
) -> None:
    """FlashAttention is given the same places in memory and the same numbers in every replay."""
    world = make(fp8=fp8)
    names = everybody(world, case)
    graphs, calls = world.capture_all(case.split("-")[0], 6), list[dict[str, Any]]()

    def record(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip("qkv", args, strict=True)), **kwargs}
        if case == "local":  # temporary tensors: a graph has them for itself, here they are others in every replay
            del given["out"], given["seqused_k"]
        calls.append(
            {
                name: (value.data_ptr(), value.shape, value.stride()) if isinstance(value, torch.Tensor) else value
                for name, value in given.items()
            }
        )
        return naive_flash.flash_attn_varlen_func(*args, **kwargs)

    monkeypatch.setattr(cuda_backend, "flash_attn_varlen_func", record)
    by_graph = dict[int, list[list[dict[str, Any]]]]()
    for few in (names, ["two", "both"], names[::-1], ["one"], ["dense", "one", "packed"]) * 2:
        step = world.decode(few, graphs)
        check(world, step)
        by_graph.setdefault(id(step.metadata), []).append(list(calls))
        calls.clear()
    assert any(len(replays) > 2 and replays[0] for replays in by_graph.values())
    for replays in by_graph.values():
        assert all(replay == replays[0] for replay in replays)
    for call in (call for replays in by_graph.values() for call in replays[0]):
        assert (call["max_seqlen_q"], call["causal"], call["fa_version"], call["num_splits"]) == (1, False, 3, 32)
        descales = {name for name in call if name.endswith("descale")}
        assert descales == ({"q_descale", "k_descale", "v_descale"} if fp8 else set())


# Kernels


@pytest.mark.parametrize("case", [case for case in CASES if case != "recycled-turning"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_kernels(make: Make, case: str) -> None:
    """What a GPU runs, for few rows and steps: the interpreter takes its time."""
    from attention_plugins import kernels

    world, seen = make(kernels), Seen()
    everybody(world, case)
    names = ["one", "packed", "both"]
    graphs = world.capture_all(case, 4)
    for number in range(4):
        names = names[1:] + names[:1]
        seen.note(world, world.run(dict.fromkeys(names, 1)) if number == 2 else world.decode(names, graphs), graphs)
    seen.note(world, world.decode(["both", "one"], graphs), graphs)
    seen.all_of(case)


# FlashAttention over page tables


@CACHES
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (6, 3), (2, 2)])
def test_log_denominators(make: Make, num_heads: int, num_kv_heads: int, fp8: bool) -> None:
    """Of each row, KV head and query head in this order, as the naive twin says, who agrees on the outputs too."""
    world = make(num_heads=num_heads, num_kv_heads=num_kv_heads, fp8=fp8)
    names = {"a": 37, "b": 5, "c": 64}
    for name, length in names.items():
        world.add(name, length)
    step = world.run(names)
    reader = world.runtime.selecting.readers["quest"]
    for layer, cache in enumerate(world.runtime.selecting.caches):
        pages = torch.zeros(len(names) * num_kv_heads, 5, dtype=torch.int32)
        lengths = torch.tensor(list(names.values()), dtype=torch.int32).repeat_interleave(num_kv_heads)
        lengths[-1] = 0
        for row, (request, _, _) in enumerate(step.rows):
            found = world.compressor.geometry.pages_of(layer, torch.tensor(request.blocks))
            pages[row * num_kv_heads : (row + 1) * num_kv_heads, : found.shape[1]] = found
        queries = torch.stack([request.queries[layer, 0] for request, _, _ in step.rows])
        queries = queries.unflatten(1, (num_kv_heads, -1))
        out, expected = (torch.full(queries.shape, 7.0, dtype=world.dtype) for _ in range(2))
        lse = reader.read_pages(out, queries, pages, lengths, cache)
        said = naive_pages(expected, queries, pages, lengths, cache)
        assert lse.shape == queries.shape[:3] and lse.dtype == torch.float32
        torch.testing.assert_close(lse, said, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out, expected, rtol=2**-7 if fp8 else 1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("version", "invariant", "most", "sequences", "splits"),
    [
        (3, False, 32, 1, 32),
        (3, False, 32, 16, 32),
        (3, False, 32, 17, 31),
        (3, False, 8, 17, 8),
        (3, False, 32, 528, 1),
        (3, False, 32, 2000, 1),
        (3, True, 32, 1, 1),
        (2, False, 32, 1, 1),
    ],
)
def test_number_of_splits(
    make: Make, cuda_backend: ModuleType, version: int, invariant: bool, most: int, sequences: int, splits: int
) -> None:
    """Never 0, which lets FlashAttention choose by lengths: a graph could not."""
    world = make(fa_version=version)
    impl = world.layers[0].impl
    impl.batch_invariant_enabled, impl.max_num_splits = invariant, most
    assert cuda_backend.FlashPages(world.layers, sequences)._num_splits(impl, sequences) == splits


def test_flash_attention_2(make: Make) -> None:
    world = make(fa_version=2)
    names = everybody(world, "local")
    graphs = world.capture_all("local", 6)
    check(world, world.decode(names, graphs))
    check(world, world.run(dict.fromkeys(names, 1)))


def test_every_selector_is_tested() -> None:
    assert {case.split("-")[0] for case in CASES} == set(selectors())
