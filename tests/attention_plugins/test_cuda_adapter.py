"""Attention of the CUDA adapter against brute force over the tokens that were kept, outside and inside graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from attention_plugins.vllm_adapter.runtime import BatchKind
from attention_plugins.vllm_adapter.split import SplitMetadata, shortened
from kvcache.observers.base import Observer
from kvcache.observers.window import QueryWindow
from tests import naive_flash

if TYPE_CHECKING:
    from tests.attention_plugins.cuda_world import Graph, Step, World

MakeWorld = Callable[..., "World"]
HEADS = pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (6, 3), (3, 1), (2, 2)])
CACHES = pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])


def compacted_or_dense(world: World) -> None:
    """Six requests whose prompts are done: three compacted (with a tail, without, with one token), three dense."""
    for name, prompt_len, kept_pages in [
        ("dense", 37, None), ("long", 90, 2), ("even", 64, 1), ("plain", 16, None), ("one", 49, 2), ("short", 5, None),
    ]:  # fmt: skip
        world.add(name, prompt_len, kept_pages)
    check(world, world.run({name: request.prompt_len for name, request in world.requests.items()}), "dense")


def check(world: World, step: Step, kind: str) -> None:
    """Outputs of a step, and that the batch was of this kind."""
    compacted = [request.compacted for request, _, _ in step.rows]
    assert kind == ("compacted" if all(compacted) else "mixed" if any(compacted) else "dense")
    rtol = 2**-8 if world.fp8 else 1e-4
    for layer, (output, dense) in enumerate(zip(step.outputs, step.dense, strict=True)):
        assert (dense is None) == all(compacted), "the dense path runs for dense rows"
        for request, first, last, rows in step.tokens():
            expected = world.expected(layer, request, first, last)
            torch.testing.assert_close(output[rows].float(), expected, rtol=rtol, atol=1e-5)
            if not request.compacted:
                assert dense is not None and torch.equal(output[rows], dense[rows]), "what the dense path wrote stays"


def graphs(world: World) -> dict[str, Graph]:
    return {kind: world.capture(kind, 8) for kind in (BatchKind.COMPACTED, BatchKind.MIXED)}


def untouched(step: Step, first: int) -> bool:
    """Whether nothing was written from this output row on."""
    from tests.attention_plugins.cuda_world import UNWRITTEN

    return all(len(output) > first and bool((output[first:] == UNWRITTEN).all()) for output in step.outputs)


# Outside of FULL graphs


@HEADS
@CACHES
def test_rows_of_all_kinds(make_world: MakeWorld, num_heads: int, num_kv_heads: int, fp8: bool) -> None:
    """Dense and compacted rows with one token and with several, then in another order, across page boundaries."""
    world = make_world(num_heads=num_heads, num_kv_heads=num_kv_heads, fp8=fp8)
    compacted_or_dense(world)
    step = world.run({"dense": 1, "long": 1, "plain": 20, "even": 5, "short": 3, "one": 1}, padding=2)
    check(world, step, "mixed")
    assert untouched(step, 31)
    slots = [world.compressor.slot(name) for name in ("long", "even", "one")]
    assert any(len(world.compressor.tables.counts[slot].unique()) > 1 for slot in slots), "rows are of equal length"
    for scheduled in (
        {"one": 16, "dense": 1, "even": 33, "long": 2},
        {"short": 1, "long": 1, "dense": 17},
        {"even": 1, "plain": 1, "long": 40, "one": 1, "short": 1, "dense": 1},
    ):
        check(world, world.run(scheduled), "mixed")
    check(world, world.run({"plain": 1, "dense": 4}), "dense")
    step = world.run({"long": 1, "one": 7, "even": 1}, padding=3)
    check(world, step, "compacted")
    assert untouched(step, 9)


def test_tokens_one_by_one(make_world: MakeWorld) -> None:
    """Through a page boundary of every row, once in each way to run."""
    world = make_world()
    compacted_or_dense(world)
    captured = graphs(world)
    for _ in range(17):
        check(world, world.run(dict.fromkeys(world.requests, 1)), "mixed")
        check(world, world.replay(captured["mixed"], world.requests), "mixed")
        check(world, world.replay(captured["compacted"], ["one", "even", "long"]), "compacted")


def test_softcap_reaches_the_kernel(make_world: MakeWorld) -> None:
    world = make_world(softcap=0.7)
    compacted_or_dense(world)
    check(world, world.run(dict.fromkeys(world.requests, 1)), "mixed")
    with pytest.raises(AssertionError, match="not close"):
        world.softcap = 0.0
        check(world, world.run({"long": 1}), "compacted")


@pytest.mark.parametrize("fa_version", [2, 3])
def test_learned_sinks_have_their_part(make_world: MakeWorld, fa_version: int) -> None:
    """Eagerly, with several tokens a row, and in graphs."""
    world = make_world(sinks=True, fa_version=fa_version)
    compacted_or_dense(world)
    captured = graphs(world)
    check(world, world.run({"one": 1, "even": 3, "long": 2, "dense": 1}), "mixed")
    check(world, world.replay(captured["mixed"], world.requests), "mixed")
    check(world, world.replay(captured["compacted"], ["one", "even", "long"]), "compacted")
    with pytest.raises(AssertionError, match="not close"):
        world.sinks = None
        check(world, world.run({"long": 1}), "compacted")


def test_layers_that_are_not_ours_get_vllms_metadata(make_world: MakeWorld) -> None:
    """Whatever else is in the step: their blocks are vLLM's."""
    world = make_world()
    compacted_or_dense(world)
    ours = world.builder.kv_cache_spec
    world.builder.kv_cache_spec = SlidingWindowSpec(
        block_size=16, num_kv_heads=2, head_size=8, dtype=torch.float32, sliding_window=32
    )
    with world.step({"one": 1, "dense": 1}) as rows:
        metadata = world.builder.build(0, world.common(rows))
    assert type(metadata) is FlashAttentionMetadata
    assert metadata.seq_lens.tolist() == [last for _, _, last in rows]
    world.builder.kv_cache_spec = ours
    assert type(world.run({"one": 1}).metadata) is SplitMetadata


def test_a_preempted_request_starts_again(make_world: MakeWorld) -> None:
    """Dense until its prompt is done again, while others stay compacted; its pages are kept differently then."""
    world = make_world()
    compacted_or_dense(world)
    check(world, world.run(dict.fromkeys(world.requests, 1)), "mixed")
    before = world.compressor.kept_positions("long")
    check(world, world.run({"even": 1, "dense": 1}, preempted=["long"], finished=["one"]), "mixed")
    check(world, world.run({"even": 1, "long": 50}), "mixed")
    check(world, world.run({"long": 40, "short": 1}), "dense")
    check(world, world.run({"long": 1, "even": 1}), "compacted")
    after = world.compressor.kept_positions("long")
    assert [[row.tolist() for row in rows] for rows in before] != [[row.tolist() for row in rows] for rows in after]


def test_without_a_runtime_everything_is_dense(make_world: MakeWorld) -> None:
    """As when vLLM profiles memory, before there is a KV cache."""
    from attention_plugins.vllm_adapter.runtime import set_runtime

    world = make_world()
    set_runtime(world.config, None)
    world.add("a", 20)
    step = world.run({"a": 20})
    check(world, step, "dense")
    assert (step.metadata.compacted, step.metadata.captures, step.metadata.mask) == (None, [], None)


def test_warm_up_runs_are_vllms(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

    world = make_world()
    monkeypatch.setattr(FlashAttentionImpl, "forward", lambda impl, *args: args)
    given = (world.layers[0], *(torch.zeros(0) for _ in range(4)), None, torch.zeros(2), None, None)
    assert world.layers[0].impl.forward(*given) == given


# FULL graphs


@HEADS
@CACHES
def test_graph_of_compacted_rows(make_world: MakeWorld, num_heads: int, num_kv_heads: int, fp8: bool) -> None:
    """Batches of other rows and sizes from step to step; padded rows have no pages."""
    world = make_world(num_heads=num_heads, num_kv_heads=num_kv_heads, fp8=fp8)
    compacted_or_dense(world)
    graph = graphs(world)["compacted"]
    for names in (["long", "even", "one"], ["one", "long"], ["even"], ["one", "even", "long"]):
        step = world.replay(graph, names)
        check(world, step, "compacted")
        assert step.metadata.dense is None
        assert world.buffers.lengths[len(names) * num_kv_heads :].tolist() == [0] * (8 - len(names)) * num_kv_heads
        assert world.buffers.slots[len(names) :].tolist() == [-1] * (8 - len(names))
        assert not any(output[len(names) :].any() for output in step.outputs)


@HEADS
@CACHES
def test_graph_of_mixed_rows(make_world: MakeWorld, num_heads: int, num_kv_heads: int, fp8: bool) -> None:
    """A row that was compacted in one step is dense in the next, and is padding after that."""
    world = make_world(num_heads=num_heads, num_kv_heads=num_kv_heads, fp8=fp8)
    compacted_or_dense(world)
    graph = graphs(world)["mixed"]
    for names in (
        ["dense", "long", "plain", "even", "one", "short"],
        ["long", "dense", "even", "plain", "short", "one"],
        ["plain", "one"],
        ["even", "short", "dense"],
        ["dense", "short", "long", "one", "even", "plain"],
    ):
        step = world.replay(graph, names)
        check(world, step, "mixed")
        assert untouched(step, len(names))
        compacted = [world.requests[name].compacted for name in names] + [False] * (8 - len(names))
        assert graph.metadata.mask.flatten().tolist() == compacted
        slots = [world.compressor.slot(name) for name in names] + [None] * (8 - len(names))
        assert graph.metadata.compacted.slots.tolist() == [-1 if slot is None else slot for slot in slots]
        lengths = [1 if world.requests[name].compacted else world.requests[name].computed for name in names]
        assert graph.metadata.dense.seq_lens.tolist() == lengths + [0] * (8 - len(names))


def test_graphs_and_eager_steps_in_turn(make_world: MakeWorld) -> None:
    """All kinds share the buffers; what one wrote must not reach the others. Requests come and go meanwhile."""
    world = make_world()
    compacted_or_dense(world)
    captured = graphs(world)
    check(world, world.run({"dense": 1, "long": 1, "even": 1, "one": 1}), "mixed")
    check(world, world.replay(captured["mixed"], ["one", "plain", "long", "even"]), "mixed")
    check(world, world.replay(captured["compacted"], ["long", "even"]), "compacted")
    world.add("new", 70, 3)
    check(world, world.run({"long": 1, "new": 70}, finished=["even"]), "mixed")
    check(world, world.replay(captured["compacted"], ["new", "long"]), "compacted")
    check(world, world.replay(captured["mixed"], ["plain", "new"], preempted=["long"]), "mixed")
    check(world, world.run({"new": 1, "long": 90, "one": 2}), "mixed")
    check(world, world.replay(captured["mixed"], ["one", "dense", "long", "short", "new"]), "mixed")


@CACHES
@pytest.mark.parametrize("kind", [BatchKind.COMPACTED, BatchKind.MIXED])
def test_all_that_a_graph_fixes_stays(
    make_world: MakeWorld, cuda_backend: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: BatchKind, fp8: bool
) -> None:
    """The kernel is given the same places in memory and the same numbers in every replay."""
    world = make_world(fp8=fp8)
    compacted_or_dense(world)
    graph, calls = world.capture(kind, 7), list[dict[str, Any]]()

    def record(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip("qkv", args, strict=True)), **kwargs}
        calls.append(
            {
                name: (value.data_ptr(), value.shape, value.stride()) if isinstance(value, torch.Tensor) else value
                for name, value in given.items()
            }
        )
        return naive_flash.flash_attn_varlen_func(*args, **kwargs)

    monkeypatch.setattr(cuda_backend, "flash_attn_varlen_func", record)
    dense = ["plain", "short", "dense"] if kind == BatchKind.MIXED else []
    for names in (["one", *dense[:1]], ["long", *dense, "even", "one"], ["even", *dense[1:]]):
        check(world, world.replay(graph, names), kind)
    layers = len(world.layers)
    assert calls[:layers] == calls[layers : 2 * layers] == calls[2 * layers :]
    for call in calls[:layers]:
        assert (call["max_seqlen_q"], call["num_splits"], call["fa_version"]) == (1, 32, 3)
        assert call["max_seqlen_k"] >= 192, "the longest request's"
        assert (call.get("out") is None) == (kind == BatchKind.MIXED)
        descales = {name for name in call if name.endswith("descale")}
        assert descales == ({"q_descale", "k_descale", "v_descale"} if fp8 else set())


def test_graphs_of_flash_attention_2(make_world: MakeWorld) -> None:
    """What runs on compute capability 8.x."""
    world = make_world(fa_version=2)
    compacted_or_dense(world)
    captured = graphs(world)
    check(world, world.replay(captured["compacted"], ["long", "even"]), "compacted")
    check(world, world.replay(captured["mixed"], ["long", "dense"]), "mixed")


def test_flash_attention_2_outside_of_graphs(make_world: MakeWorld) -> None:
    world = make_world(fa_version=2)
    compacted_or_dense(world)
    check(world, world.run(dict.fromkeys(world.requests, 1)), "mixed")


# What the kernel is told


@pytest.mark.parametrize(
    ("sequences", "in_graph", "invariant", "splits"),
    [
        (1, False, False, 0),
        (528, False, False, 0),
        (529, False, False, 1),
        (1, True, False, 32),
        (528, True, False, 32),
        (529, True, False, 1),
        (993, True, False, 1),
        (1, False, True, 1),
        (1, True, True, 1),
    ],
)
def test_number_of_splits(make_world: MakeWorld, sequences: int, in_graph: bool, invariant: bool, splits: int) -> None:
    impl = make_world().layers[0].impl
    impl.batch_invariant_enabled = invariant
    assert impl._num_splits(sequences, in_graph) == splits


def test_the_stand_in_takes_what_vllms_function_takes() -> None:
    code = naive_flash.flash_attn_varlen_func.__code__
    taken = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    assert taken and set(taken) <= set(naive_flash.real_signature().parameters)


# Evidence


@CACHES
def test_queries_of_open_windows_are_kept(make_world: MakeWorld, fp8: bool) -> None:
    """Of prompts in chunks, across steps, beside rows of all kinds; nothing of anybody else."""
    world = make_world(fp8=fp8)
    compacted_or_dense(world)
    world.add("window", 60, 2, window=9)
    world.add("later", 40, 1, window=40)
    world.add("none", 60, 2)
    windows: list[Observer] = []
    for scheduled in (
        {"dense": 1, "window": 51, "none": 30},  # up to the window's first token
        {"window": 1, "long": 1, "later": 7},
        {"later": 1, "even": 3, "window": 7, "none": 30},
        {"plain": 1, "later": 32, "window": 1},
    ):
        windows = [observer for name in ("window", "later") for observer in world.compressor.observers(name)] or windows
        check(world, world.run(scheduled, padding=4), "mixed" if {"long", "even"} & set(scheduled) else "dense")
    for name, window in zip(("window", "later"), windows, strict=True):
        request = world.requests[name]
        assert isinstance(window, QueryWindow) and window.missing == 0
        expected = request.queries[:, request.prompt_len - request.window : request.prompt_len]
        assert window.queries.dtype == expected.dtype and torch.equal(window.queries.float(), expected.float())
    assert not any(world.compressor.observers(name) for name in ("none", "dense", "long", "even"))
    check(world, world.run({"window": 1, "later": 1, "none": 1, "dense": 1}), "mixed")
    check(world, world.run({"window": 2, "later": 1, "none": 1}), "compacted")


@pytest.mark.parametrize("chunks", [[60], [51, 9], [52, 8], [50, 1, 9], [55, *[1] * 5], [1] * 60])
def test_captures_say_which_queries_those_are(make_world: MakeWorld, chunks: list[int]) -> None:
    world = make_world()
    world.add("dense", 30)
    world.add("window", 60, 2, window=9)
    world.run({"dense": 30})
    position = 0
    for size in chunks:
        before = world.compressor.observers("window")
        step = world.run({"dense": 1, "window": size})
        first = max(51, position)
        position += size
        expected = [] if first >= position else [(first, 1 + size - (position - first), 1 + size)]
        captures = step.metadata.captures
        assert [(capture.position, capture.first, capture.last) for capture in captures] == expected
        (window,) = world.compressor.observers("window")
        assert before in ((), (window,)) and all(capture.observer is window for capture in captures)
    check(world, world.run({"dense": 1, "window": 1}), "mixed")


def test_nothing_is_looked_for_where_no_prompt_is_recorded(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()
    world.add("window", 60, 2, window=9)
    world.add("dense", 30)
    world.run({"window": 20, "dense": 30})
    with world.step({"dense": 1}) as rows:  # the other one waits
        monkeypatch.setattr(world.compressor, "observers", lambda name: pytest.fail(f"asked for {name}"))
        assert world.builder.build(0, world.common(rows)).captures == []


# Metadata


def batch(lens: list[int], lengths: list[int], bounds: list[int] | None) -> Any:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    start = torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start.clone(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=len(lens),
        num_actual_tokens=sum(lens),
        max_query_len=max(lens),
        max_seq_len=1000,
        block_table_tensor=torch.zeros(len(lens), 4, dtype=torch.int32),
        slot_mapping=torch.zeros(sum(lens), dtype=torch.int64),
        seq_lens_cpu_upper_bound=None if bounds is None else torch.tensor(bounds, dtype=torch.int32),
    )


@pytest.mark.parametrize(
    ("compacted", "lengths", "bounds", "most"),
    [
        ([True, False, True, False], [1, 40, 7, 300], [1, 41, 7, 302], 302),
        ([False, True, False, True], [100, 3, 200, 2], [110, 3, 201, 2], 201),
        ([True, True, True, False], [1, 3, 7, 300], [1, 3, 7, 302], 302),
        ([False, False, False, False], [100, 40, 200, 300], [110, 41, 201, 302], 302),
    ],
)
def test_dense_rows_see_compacted_ones_shortened(
    compacted: list[bool], lengths: list[int], bounds: list[int], most: int
) -> None:
    """To their queries, in all lengths that the batch has."""
    common = batch([1, 3, 7, 2], [100, 40, 200, 300], [110, 41, 201, 302])
    before = replace(common, seq_lens=common.seq_lens.clone())
    short = shortened(common, np.array(compacted), None)
    assert short.seq_lens.tolist() == lengths and short.seq_lens.dtype == torch.int32
    assert short.seq_lens_cpu_upper_bound.tolist() == bounds
    assert short.seq_lens_cpu_upper_bound.dtype == torch.int32 and short.max_seq_len == most
    assert common.seq_lens.tolist() == before.seq_lens.tolist() and common.max_seq_len == 1000
    assert common.seq_lens_cpu_upper_bound.tolist() == [110, 41, 201, 302]
    kept = {"seq_lens", "seq_lens_cpu_upper_bound", "max_seq_len"}
    assert all(getattr(short, name) is value for name, value in vars(common).items() if name not in kept)

    short = shortened(batch([1, 3, 7, 2], [100, 40, 200, 300], None), np.array(compacted), None)
    assert (short.seq_lens.tolist(), short.seq_lens_cpu_upper_bound, short.max_seq_len) == (lengths, None, 1000)


def test_what_vllms_builder_is_given(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense batch as it came; beside compacted rows no common prefix, which they would not have."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

    world = make_world()
    compacted_or_dense(world)
    calls: list[tuple[Any, ...]] = []

    def build(builder: Any, *args: Any) -> Any:
        calls.append(args)
        return "dense"

    monkeypatch.setattr(FlashAttentionMetadataBuilder, "build", build)
    with world.step({"dense": 1, "plain": 2}) as rows:
        common = world.common(rows)
        metadata = world.builder.build(3, common, True)
        assert len(calls) == 1 and calls.pop() == (3, common, True) and metadata.dense == "dense"
    with world.step({"dense": 1, "long": 2}) as rows:
        common = world.common(rows)
        assert world.builder.build(3, common, True).dense == "dense"
        (prefix, given), *others = calls
        assert (prefix, others, given.seq_lens.tolist()) == (0, [], [world.requests["dense"].computed + 1, 1])
        assert given.max_seq_len == given.seq_lens_cpu_upper_bound.max() == world.requests["dense"].computed + 1
    calls.clear()
    with world.step({"long": 2}) as rows:
        assert world.builder.build(3, world.common(rows), True).dense is None and calls == []


@pytest.mark.parametrize(("max_num_reqs", "num_kv_heads", "max_pages"), [(1, 1, 1), (7, 3, 11)])
def test_buffers(cuda_backend: ModuleType, max_num_reqs: int, num_kv_heads: int, max_pages: int) -> None:
    buffers = cuda_backend.StepBuffers.make(max_num_reqs, num_kv_heads, max_pages, torch.device("cpu"))
    tensors = dict(vars(buffers))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "slots": (max_num_reqs,),
        "mask": (max_num_reqs, 1, 1),
        "dense_lens": (max_num_reqs,),
        "query_start": (max_num_reqs * num_kv_heads + 1,),
        "pages": (max_num_reqs * num_kv_heads, max_pages),
        "lengths": (max_num_reqs * num_kv_heads,),
    }
    assert tensors.pop("mask").dtype == torch.bool
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int32}
    assert buffers.slots.tolist() == [-1] * max_num_reqs
    assert buffers.query_start.tolist() == list(range(max_num_reqs * num_kv_heads + 1))
    said = cuda_backend.StepBuffers.nbytes(max_num_reqs, num_kv_heads, max_pages)
    assert said == sum(tensor.nbytes for tensor in vars(buffers).values())


def test_the_backend_is_vllms_with_our_parts(cuda_backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends import registry
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, SlidingWindowSpec

    from kvcache.vllm_adapter.manager import CompressibleAttentionSpec

    backend = cuda_backend.CUDACompressedBackend
    assert issubclass(backend, FlashAttentionBackend) and backend.get_name() == "CUSTOM"
    assert backend.get_impl_cls() is cuda_backend.CUDACompressedImpl
    assert backend.get_builder_cls() is cuda_backend.CUDACompressedMetadataBuilder
    assert backend.supported_kv_cache_layouts() == (KVCacheLayout.LBHNC,)
    sizes = {"block_size": 16, "num_kv_heads": 2, "head_size": 8, "dtype": torch.bfloat16}
    assert type(backend.customize_spec(FullAttentionSpec(**sizes))) is CompressibleAttentionSpec
    sliding = SlidingWindowSpec(**sizes, sliding_window=32)
    assert backend.customize_spec(sliding) is sliding
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})
    cuda_backend.register()
    assert registry.AttentionBackendEnum.CUSTOM.get_class() is backend
