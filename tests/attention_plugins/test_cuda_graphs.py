"""Which CUDA graph a step gets: vLLM's own choice of sizes, over graphs that only take note."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

from attention_plugins.decode.rows import Mode
from attention_plugins.decode.schedule import Read
from attention_plugins.vllm_adapter.cuda_graphs import CompressionGraphs
from attention_plugins.vllm_adapter.prefilling import NaiveExecutor, Prefilling
from attention_plugins.vllm_adapter.runtime import BatchKind, CompressionRuntime
from attention_plugins.vllm_adapter.selection import Selecting, Selection
from kvcache.vllm_adapter.orders import StepOrders, attach_orders

Make = Callable[..., "Graphs"]
MODES = [
    CUDAGraphMode.NONE,
    CUDAGraphMode.PIECEWISE,
    CUDAGraphMode.FULL,
    CUDAGraphMode.FULL_DECODE_ONLY,
    CUDAGraphMode.FULL_AND_PIECEWISE,
]
WITH_FULL = MODES[2:]
OURS = [BatchKind.COMPACTED, BatchKind.MIXED]
SIZES, MAX_REQS = [1, 2, 4, 16], 8
"""Graphs of 16 tokens can't be of decodes alone: there are no 16 requests."""
DECODES = [(num, num, 1) for num in range(1, MAX_REQS + 1)]
OTHERS = [(1, 7, None), (3, 5, None), (2, 16, None), (8, 17, None), (1, 1, None), (4, 8, 2)]
LORAS = [0, 1, 2]
ROWS = 3
"""Of selectors' readers: of vLLM's sizes only those up to it are theirs."""
EVER, NEVER, PARTLY = Selection("either", True), Selection("differs", False), Selection("differs", True)
READERS: dict[str, Any] = {
    "either": SimpleNamespace(place=SimpleNamespace(rows=ROWS), whole=lambda modes: True),
    "differs": SimpleNamespace(place=SimpleNamespace(rows=ROWS), whole=lambda modes: bool(modes & Mode.DENSE)),
}
"""What is asked of readers here: to one it makes a difference whether some row reads everything."""


class Graphs:
    """Our manager and vLLM's, captured alike. `log`: whose graph was replayed."""

    def __init__(self, mode: CUDAGraphMode, lora_cases: list[int], readers: dict[str, Any]) -> None:
        config = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=MAX_REQS),
            compilation_config=SimpleNamespace(cudagraph_capture_sizes=SIZES, max_cudagraph_capture_size=SIZES[-1]),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
            cache_config=SimpleNamespace(use_kda_recoverssm=False),
            speculative_config=None,
        )
        compressor: Any = SimpleNamespace(
            requests={"packed": None},
            pages=torch.zeros(1, 1),
            slot=lambda name: 0 if name == "packed" else None,
            observers=lambda name: (),
        )
        prefilling = Prefilling((), torch.float32, {}, NaiveExecutor())
        self.runtime = CompressionRuntime(
            compressor,
            Selecting(compressor, readers, ()),
            prefilling,
            lambda common: [],
        )
        self.stock = ModelCudaGraphManager(config, torch.device("cpu"), mode, 1, lora_capture_cases=lora_cases)
        self.ours = CompressionGraphs(self.stock, self.runtime)
        self.log: list[ModelCudaGraphManager] = []
        self.captures: list[tuple[ModelCudaGraphManager, Any, tuple[Any, ...], dict[str, Any]]] = []

    def captured(self, manager: ModelCudaGraphManager, *args: Any, **kwargs: Any) -> None:
        """In place of vLLM's `capture`."""
        self.captures.append((manager, self.runtime.graph, args, kwargs))
        manager._graphs_captured = True
        manager.hidden_states = torch.full((SIZES[-1], 2), float(len(self.captures)))
        for desc in manager._capture_descs.get(CUDAGraphMode.FULL, []):
            manager.graphs[desc] = SimpleNamespace(replay=lambda: self.log.append(manager))

    def dispatch(
        self, kind: BatchKind, batch: tuple[int, int, int | None], loras: int = 0, recording: bool = False
    ) -> BatchExecutionDescriptor:
        """What a step of this kind gets; `runtime.graph` is left as the step leaves it."""
        self.runtime.end_step()
        self.runtime.kind, self.runtime.recording = kind, recording
        self.runtime.wanted = None if kind is BatchKind.DENSE else kind
        return self.ours.dispatch(*batch, num_active_loras=loras, max_query_len=batch[2])

    def step(self, rows: dict[str, str], tokens: int = 1, loras: int = 0) -> BatchExecutionDescriptor:
        """What a step gets in which requests (by name) have selectors ("" for none), the first so many tokens."""
        self.runtime.end_step()
        reads = {name: Read(name, selector, Mode.SELECT, 9, 4, 0.0, 0) for name, selector in rows.items() if selector}
        scheduled = dict.fromkeys(rows, 1)
        scheduled[next(iter(rows))] = tokens
        cached = SimpleNamespace(req_ids=list(rows), num_computed_tokens=[8] * len(rows))
        output = SimpleNamespace(
            finished_req_ids=set(),
            preempted_req_ids=None,
            num_scheduled_tokens=scheduled,
            scheduled_new_reqs=[],
            scheduled_cached_reqs=cached,
        )
        attach_orders(output, StepOrders(reads=reads))
        self.runtime.begin_step(output)
        total = sum(scheduled.values())
        # vLLM calls a batch uniform by its numbers alone.
        count = tokens if total == tokens * len(rows) else None
        return self.ours.dispatch(len(rows), total, count, num_active_loras=loras, max_query_len=count)

    def vllms(
        self, batch: tuple[int, int, int | None], loras: int = 0, uniform: bool = True
    ) -> BatchExecutionDescriptor:
        num_reqs, num_tokens, count = batch
        return self.stock.dispatch(num_reqs, num_tokens, count if uniform else None, loras, max_query_len=count)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    only = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: only)
    monkeypatch.setattr(cudagraph_utils, "current_platform", SimpleNamespace(get_global_graph_pool=lambda: None))
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (1 << 30, 2 << 30))

    def run(
        mode: CUDAGraphMode,
        *,
        lora_cases: list[int] | None = None,
        capture: bool = True,
        readers: dict[str, Any] | None = None,
    ) -> Graphs:
        graphs = Graphs(mode, lora_cases or [0], readers or {})
        monkeypatch.setattr(ModelCudaGraphManager, "capture", lambda *args, **kwargs: graphs.captured(*args, **kwargs))
        if capture:
            graphs.stock.capture()
            graphs.ours.capture()
        return graphs

    return run


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_dense_steps_run_as_in_vllm(make: Make, mode: CUDAGraphMode) -> None:
    graphs = make(mode, lora_cases=[0, 2])
    full = 0
    for batch in DECODES + OTHERS:
        for loras in LORAS:
            desc = graphs.dispatch(BatchKind.DENSE, batch, loras)
            assert desc == graphs.vllms(batch, loras)
            assert graphs.runtime.graph is None
            if desc.cg_mode == CUDAGraphMode.FULL:
                output = graphs.ours.run_fullgraph(desc)
                assert graphs.log.pop() is graphs.ours and len(output) == desc.num_tokens
                full += 1
    assert (full > 0) == (mode in WITH_FULL) and graphs.log == []


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("mode", WITH_FULL, ids=str)
def test_decodes_with_compacted_rows_have_graphs_of_their_own(make: Make, mode: CUDAGraphMode, kind: BatchKind) -> None:
    graphs = make(mode, lora_cases=[0, 2])
    number = {manager: place for place, (manager, *_) in enumerate(graphs.captures, start=1)}
    for batch in DECODES[:4]:
        for loras, case in ((0, 0), (1, 2), (2, 2)):
            size = {1: 1, 2: 2, 3: 4, 4: 4}[batch[0]]
            desc = graphs.dispatch(kind, batch, loras)
            assert desc == BatchExecutionDescriptor(CUDAGraphMode.FULL, size, size, 1, num_active_loras=case)
            if mode != CUDAGraphMode.FULL:  # whose graphs are not of decodes alone
                assert desc == graphs.vllms(batch, loras)
            assert graphs.runtime.graph is kind
            output = graphs.ours.run_fullgraph(desc)
            own = graphs.ours.by_kind[kind]
            assert graphs.log.pop() is own and own not in (graphs.ours, graphs.stock)
            assert output.tolist() == [[float(number[own])] * 2] * size, "the hidden states of the same set"
    assert graphs.ours.by_kind[BatchKind.COMPACTED] is not graphs.ours.by_kind[BatchKind.MIXED]


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_other_steps_with_compacted_rows_have_none(make: Make, mode: CUDAGraphMode, kind: BatchKind) -> None:
    """Prompts beside them, and batches of sizes that no graph of decodes has: piecewise, where vLLM has that."""
    graphs = make(mode)
    piecewise = 0
    for batch in DECODES[4:] + OTHERS:
        desc = graphs.dispatch(kind, batch)
        assert graphs.runtime.graph is None
        expected = graphs.vllms(batch, uniform=False)
        if expected.cg_mode == CUDAGraphMode.FULL:
            expected = BatchExecutionDescriptor(CUDAGraphMode.NONE, batch[1], batch[0])
        assert desc == expected and desc.cg_mode != CUDAGraphMode.FULL
        piecewise += desc.cg_mode == CUDAGraphMode.PIECEWISE
    assert (piecewise > 0) == mode.has_piecewise_cudagraphs()


@pytest.mark.parametrize("kind", OURS)
def test_vllms_full_graphs_are_no_stand_in_for_ours(make: Make, kind: BatchKind) -> None:
    graphs = make(CUDAGraphMode.FULL_AND_PIECEWISE)
    graphs.ours.by_kind[kind].release_graphs()
    desc = graphs.dispatch(kind, (2, 2, 1))
    assert desc == graphs.vllms((2, 2, 1), uniform=False) and desc.cg_mode == CUDAGraphMode.PIECEWISE
    assert graphs.runtime.graph is None


@pytest.mark.parametrize("kind", BatchKind)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_steps_that_record_queries_have_no_full_graph(make: Make, mode: CUDAGraphMode, kind: BatchKind) -> None:
    """A prompt's last token may come alone, and then the batch looks like one of decodes."""
    graphs = make(mode)
    for batch in DECODES + OTHERS:
        desc = graphs.dispatch(kind, batch, recording=True)
        assert graphs.runtime.graph is None
        expected = graphs.vllms(batch, uniform=False)
        if expected.cg_mode == CUDAGraphMode.FULL:
            expected = BatchExecutionDescriptor(CUDAGraphMode.NONE, batch[1], batch[0])
        assert desc == expected and desc.cg_mode != CUDAGraphMode.FULL
        if batch[1] <= SIZES[-1] and mode.has_piecewise_cudagraphs():
            assert desc.cg_mode == CUDAGraphMode.PIECEWISE


@pytest.mark.parametrize("mode", [CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE], ids=str)
def test_without_full_graphs_there_are_no_sets_of_ours(make: Make, mode: CUDAGraphMode) -> None:
    graphs = make(mode)
    assert graphs.ours.by_kind == {} and len(graphs.captures) == 2
    for kind in OURS:
        for batch in DECODES + OTHERS:
            assert graphs.dispatch(kind, batch) == graphs.vllms(batch)
            assert graphs.runtime.graph is None


@pytest.mark.parametrize("kind", OURS)
def test_the_next_step_starts_afresh(make: Make, kind: BatchKind) -> None:
    graphs = make(CUDAGraphMode.FULL_AND_PIECEWISE)
    desc = graphs.dispatch(kind, (4, 4, 1))
    graphs.runtime.end_step()
    assert (graphs.runtime.graph, graphs.runtime.kind) == (None, BatchKind.DENSE)
    graphs.ours.run_fullgraph(desc)
    assert graphs.log == [graphs.ours], "the same sizes, but a dense batch"
    assert graphs.ours.dispatch(4, 4, 1, 0, max_query_len=1) == graphs.vllms((4, 4, 1))
    assert graphs.runtime.graph is None


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_kind_is_captured(make: Make, mode: CUDAGraphMode) -> None:
    graphs = make(mode, capture=False)
    assert graphs.ours.needs_capture() == graphs.stock.needs_capture() == (mode != CUDAGraphMode.NONE)
    for batch in DECODES + OTHERS:
        for kind in BatchKind:
            assert graphs.dispatch(kind, batch) == BatchExecutionDescriptor(CUDAGraphMode.NONE, batch[1], batch[0])
    graphs.runtime.end_step()
    graphs.ours.capture("model", "state", has_lora=True, progress_bar_desc="Capturing")
    assert [(manager, graph) for manager, graph, _, _ in graphs.captures] == [
        (graphs.ours, None),
        *((graphs.ours.by_kind[kind], kind) for kind in (OURS if mode in WITH_FULL else [])),
    ]
    for (manager, _, args, kwargs), shown in zip(graphs.captures, ["Capturing", "compacted", "mixed"], strict=False):
        assert args == ("model", "state") and kwargs.pop("has_lora")
        assert shown in kwargs.pop("progress_bar_desc") and kwargs == {}
        assert manager.decode_query_len == 1 and manager.vllm_config is graphs.stock.vllm_config
    assert graphs.runtime.graph is None


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_our_manager_has_vllms_sizes(make: Make, mode: CUDAGraphMode) -> None:
    graphs = make(mode, lora_cases=[0, 2], capture=False)
    for name in ("cudagraph_mode", "decode_query_len", "lora_capture_cases", "device", "_candidates", "_capture_descs"):
        assert getattr(graphs.ours, name) == getattr(graphs.stock, name), name
    for own in graphs.ours.by_kind.values():
        decodes = {desc for desc in own._capture_descs[CUDAGraphMode.FULL] if desc.num_active_loras == 0}
        assert {(desc.num_tokens, desc.num_reqs, desc.uniform_token_count) for desc in decodes} == {
            (1, 1, 1), (2, 2, 1), (4, 4, 1),
        }  # fmt: skip
        assert list(own._capture_descs) == [CUDAGraphMode.FULL]


def test_all_graphs_are_released(make: Make) -> None:
    graphs = make(CUDAGraphMode.FULL_AND_PIECEWISE)
    sets = [graphs.ours, *graphs.ours.by_kind.values()]
    assert len(sets) == 3 and all(each.graphs for each in sets)
    graphs.ours.release_graphs()
    assert not any(each.graphs for each in sets)
    for kind in BatchKind:
        assert graphs.dispatch(kind, (2, 2, 1)).cg_mode == CUDAGraphMode.NONE
        assert graphs.runtime.graph is None


# Selectors


def test_every_selection_is_captured_for_as_many_rows_as_its_reader_has(make: Make) -> None:
    graphs = make(CUDAGraphMode.FULL_AND_PIECEWISE, lora_cases=[0, 2], readers=READERS)
    assert [graph for _, graph, _, _ in graphs.captures] == [None, None, *OURS, EVER, NEVER, PARTLY]
    for manager, graph, _, kwargs in graphs.captures[4:]:
        assert manager is graphs.ours.by_kind[graph] and f"({graph})" in kwargs["progress_bar_desc"]
        (descs,) = manager._capture_descs.values()
        assert {(desc.cg_mode, desc.num_tokens, desc.num_reqs, desc.num_active_loras) for desc in descs} == {
            (CUDAGraphMode.FULL, size, size, loras) for size in (1, 2) for loras in (0, 2)
        }
        assert {desc for found in manager._candidates.values() for desc in found} == set(descs)
    assert graphs.runtime.graph is None


@pytest.mark.parametrize("mode", WITH_FULL, ids=str)
@pytest.mark.parametrize(
    ("rows", "selection"),
    [
        ({"a": "either"}, EVER),
        ({"a": "either", "b": "either"}, EVER),
        ({"a": "either", "b": ""}, EVER),
        ({"packed": "either", "b": ""}, EVER),
        ({"a": "differs"}, NEVER),
        ({"b": "differs", "packed": "differs"}, NEVER),
        ({"a": "differs", "b": ""}, PARTLY),
        ({"packed": "", "b": "differs"}, PARTLY),
    ],
)
def test_decodes_with_one_selector_have_its_graphs(
    make: Make, mode: CUDAGraphMode, rows: dict[str, str], selection: Selection
) -> None:
    graphs = make(mode, lora_cases=[0, 2], readers=READERS)
    number = {manager: place for place, (manager, *_) in enumerate(graphs.captures, start=1)}
    for loras, case in ((0, 0), (1, 2), (2, 2)):
        desc, size = graphs.step(rows, loras=loras), len(rows)
        assert desc == BatchExecutionDescriptor(CUDAGraphMode.FULL, size, size, 1, num_active_loras=case)
        assert (graphs.runtime.kind, graphs.runtime.graph) == (BatchKind.SELECTED, selection)
        output = graphs.ours.run_fullgraph(desc)
        own = graphs.ours.by_kind[selection]
        assert graphs.log.pop() is own and graphs.log == []
        assert output.tolist() == [[float(number[own])] * 2] * size


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize(
    ("rows", "tokens"),
    [
        ({"a": "either", "b": "differs"}, 1),
        ({"a": "either", "b": "differs", "packed": ""}, 1),
        ({"a": "either", "b": "either", "c": "either"}, 1),  # three: vLLM's next size is larger than the reader's rows
        ({"a": "differs", "b": "", "c": "", "d": ""}, 1),  # for which vLLM has one
        ({"packed": "either", "b": "", "c": "", "d": ""}, 1),
        ({"a": "either", "b": "", "c": "", "d": "", "e": ""}, 1),
        ({"prompt": "", "a": "either"}, 2),
        ({"prompt": "", "packed": "", "a": "either"}, 14),
        ({"prompt": "", "packed": "either"}, 30),
    ],
)
def test_other_steps_with_selectors_have_no_full_graph(
    make: Make, mode: CUDAGraphMode, rows: dict[str, str], tokens: int
) -> None:
    """Neither vLLM's nor another kind's: in those nobody selects, and all answers would silently be dense."""
    graphs = make(mode, readers=READERS)
    desc = graphs.step(rows, tokens)
    assert (graphs.runtime.kind, graphs.runtime.graph) == (BatchKind.SELECTED, None)
    batch = (len(rows), len(rows) - 1 + tokens, None)
    expected = graphs.vllms(batch)
    if expected.cg_mode == CUDAGraphMode.FULL:
        expected = BatchExecutionDescriptor(CUDAGraphMode.NONE, batch[1], batch[0])
    assert desc == expected and desc.cg_mode != CUDAGraphMode.FULL
    assert (desc.cg_mode == CUDAGraphMode.PIECEWISE) == (mode.has_piecewise_cudagraphs() and batch[1] <= SIZES[-1])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_no_other_graph_stands_in_for_a_selectors(make: Make, mode: CUDAGraphMode) -> None:
    """Where its own are gone, or there were none."""
    graphs = make(mode, readers=READERS)
    for selection in (EVER, NEVER, PARTLY):
        if own := graphs.ours.by_kind.get(selection):
            own.release_graphs()
    for rows in ({"a": "either"}, {"a": "differs"}, {"a": "differs", "b": ""}, {"packed": "either", "b": ""}):
        desc = graphs.step(rows)
        assert desc.cg_mode != CUDAGraphMode.FULL and graphs.runtime.graph is None
        assert (desc.cg_mode == CUDAGraphMode.PIECEWISE) == mode.has_piecewise_cudagraphs()


@pytest.mark.parametrize("mode", WITH_FULL, ids=str)
def test_selectors_leave_other_steps_their_graphs(make: Make, mode: CUDAGraphMode) -> None:
    """Of requests that could select, and read everything in this step."""
    graphs = make(mode, readers=READERS)
    for rows, kind in (
        ({"a": "", "b": ""}, None),
        ({"packed": ""}, BatchKind.COMPACTED),
        ({"packed": "", "b": "", "c": ""}, BatchKind.MIXED),
        ({"a": "", "b": "", "c": "", "d": ""}, None),
    ):
        graphs.step({"x": "either"})
        desc = graphs.step(rows)
        assert graphs.runtime.graph is kind and desc.cg_mode == CUDAGraphMode.FULL
        graphs.ours.run_fullgraph(desc)
        assert graphs.log.pop() is (graphs.ours.by_kind[kind] if kind else graphs.ours)


def test_a_step_that_records_queries_has_no_selectors_graph(make: Make) -> None:
    graphs = make(CUDAGraphMode.FULL_AND_PIECEWISE, readers=READERS)
    assert graphs.step({"a": "either"}).cg_mode == CUDAGraphMode.FULL
    graphs.runtime.recording, graphs.runtime.graph = True, None
    desc = graphs.ours.dispatch(1, 1, 1, 0, max_query_len=1)
    assert desc.cg_mode == CUDAGraphMode.PIECEWISE and graphs.runtime.graph is None


def test_selectors_graphs_are_released(make: Make) -> None:
    graphs = make(CUDAGraphMode.FULL_AND_PIECEWISE, readers=READERS)
    assert len(graphs.ours.by_kind) == 5 and all(own.graphs for own in graphs.ours.by_kind.values())
    graphs.ours.release_graphs()
    assert not any(own.graphs for own in graphs.ours.by_kind.values())
