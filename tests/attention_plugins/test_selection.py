"""Rows of a step as readers get them: from the scheduler's words and vLLM's metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from attention_plugins import naive
from attention_plugins.decode.base import Reader
from attention_plugins.decode.registry import selectors
from attention_plugins.decode.rows import DecodeRows, LayerCache, Mode
from attention_plugins.decode.schedule import Prepare, Read
from attention_plugins.vllm_adapter.selection import SelectedRows, Selecting, Selection
from kvcache.evidence import QuantScales
from kvcache.pages import InterleavedCodec, PageGeometry
from kvcache.tables import PageTables

PAGE, DIM, LAYERS, HEADS, BLOCKS = 4, 2, 3, 2, 40
ROWS = 5


class Note(Reader):
    """Takes note of what it is shown."""

    def __init__(self, whole: Callable[[Mode], int]) -> None:
        self.place: Any = SimpleNamespace(rows=ROWS, geometry=GEOMETRY)
        self._whole = whole
        self.prepared: list[tuple[torch.Tensor, torch.Tensor, list[LayerCache], int]] = []

    def whole(self, modes: Mode) -> int:
        return self._whole(modes)

    def prepare(self, pages: torch.Tensor, lengths: torch.Tensor, caches: list[LayerCache], state: int) -> None:
        self.prepared.append((pages, lengths, caches, state))

    def read(self, out: torch.Tensor, queries: torch.Tensor, rows: DecodeRows, cache: LayerCache, whole: int) -> None:
        raise AssertionError("nothing is read here")


GEOMETRY = PageGeometry(tuple(layer * BLOCKS * HEADS for layer in range(LAYERS)), HEADS, HEADS, PAGE, DIM)


class Worker:
    """A worker's selectors; requests "packed" and "other" are compacted.

    Attributes:
        counts: pages of "packed", by layer and head.
        sent: arrays on their way to the GPU.
    """

    def __init__(self) -> None:
        tables = PageTables(GEOMETRY, slots=6, width=20)
        self.counts = torch.tensor([[1, 3], [0, 4], [2, 2]])
        other = tables.take(torch.full((LAYERS, HEADS), 1), torch.tensor([12]), first_block=7)
        packed = tables.take(self.counts, torch.tensor([10, 11]), first_block=5)
        self.slots = {"other": other, "packed": packed}
        pages = torch.zeros(LAYERS * BLOCKS * HEADS, 2 * PAGE * DIM)
        compressor: Any = SimpleNamespace(
            pages=pages, tables=tables, slot=self.slots.get, page_counts=lambda name: {"packed": self.counts}[name]
        )
        caches = [
            LayerCache(i, pages, GEOMETRY, InterleavedCodec(PAGE, DIM), QuantScales(), 1.0) for i in range(LAYERS)
        ]
        self.readers = {
            "always": Note(lambda modes: True),
            "dense": Note(lambda modes: bool(modes & Mode.DENSE)),
            "unless": Note(lambda modes: bool(modes & ~Mode.REUSE)),
        }
        self.selecting = Selecting(compressor, self.readers, caches)
        self.sent: list[tuple[np.ndarray, torch.Tensor]] = []

    def read(self, name: str, selector: str, mode: Mode = Mode.SELECT, context: int = 40, **words: Any) -> None:
        given = {"tokens": 8, "threshold": 0.0, "place": -1, **words}
        self.selecting.reads[name] = Read(name, selector, mode, context, **given)

    def page_tables(self, names: list[str]) -> np.ndarray:
        return np.array([self.slots.get(name, -1) for name in names], dtype=np.int32)

    def send(self, data: np.ndarray, out: torch.Tensor) -> None:
        self.sent.append((data, out))
        out.copy_(torch.from_numpy(data))

    def apart(self, lens: dict[str, int]) -> list[SelectedRows]:
        names = list(lens)
        return self.selecting.apart(batch(list(lens.values())), names, self.page_tables(names))

    def fill(self, selection: Selection, names: list[str], size: int) -> SelectedRows:
        common = batch([1] * len(names) + [0] * (size - len(names)))
        return self.selecting.fill(selection, common, names, self.page_tables(names), self.send)


def batch(lens: list[int]) -> CommonAttentionMetadata:
    """Row i is 100 + i tokens long, or none where it has no token, and its blocks are 10 i, 10 i + 1, ..."""
    start = torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    n = len(lens)
    return CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start.clone(),
        seq_lens=torch.tensor([100 + i if size else 0 for i, size in enumerate(lens)], dtype=torch.int32),
        num_reqs=n,
        num_actual_tokens=sum(lens),
        max_query_len=max(lens),
        max_seq_len=1000,
        block_table_tensor=torch.arange(n * 10, dtype=torch.int32).view(n, 10),
        slot_mapping=torch.zeros(sum(lens), dtype=torch.int64),
    )


def numbers(rows: DecodeRows) -> dict[str, list[float]]:
    """All that is said of rows, but for the page tables."""
    fields = {name: getattr(rows, name) for name in ("slots", "modes", "tokens", "starts", "places", "seq_lens")}
    assert {tensor.dtype for tensor in fields.values()} == {torch.int32} and rows.thresholds.dtype == torch.float32
    return {name: tensor.tolist() for name, tensor in {**fields, "thresholds": rows.thresholds}.items()}


@pytest.fixture
def worker() -> Iterator[Worker]:
    yield Worker()


# Rows outside of graphs


def test_rows_of_each_selector(worker: Worker) -> None:
    """In the batch's order, each selector's own; rows that select nothing are in none."""
    identity = worker.selecting.tables.identity
    worker.read("a", "dense", context=33, tokens=24)
    worker.read("packed", "unless", Mode.REUSE, context=17, tokens=9, threshold=0.1, place=3)
    worker.read("b", "unless", Mode.CHECK, context=40, tokens=10, threshold=1 / 3, place=0)
    worker.read("c", "unless", Mode.SELECT, context=4, tokens=11, place=5)
    worker.read("waits", "always")
    lens = {"prompt": 7, "b": 1, "a": 1, "other": 3, "packed": 1, "plain": 1, "c": 1}
    common = batch(list(lens.values()))
    first, second = worker.apart(lens)
    assert (first.reader, second.reader) == (worker.readers["unless"], worker.readers["dense"])
    assert numbers(first.rows) == {
        "slots": [identity, worker.slots["packed"], identity],
        "modes": [Mode.CHECK, Mode.REUSE, Mode.SELECT],
        "tokens": [10, 9, 11],
        "starts": [0, 40, 60],
        "places": [0, 3, 5],
        "seq_lens": [101, 104, 106],
        "thresholds": [float(np.float32(1 / 3)), float(np.float32(0.1)), 0.0],
    }
    assert first.rows.block_table.tolist() == common.block_table_tensor[[1, 4, 6]].tolist()
    assert first.rows.tables is worker.selecting.tables
    assert first.tokens is not None and first.tokens.tolist() == [7, 12, 14]
    assert numbers(second.rows) == {
        "slots": [identity], "modes": [Mode.SELECT], "tokens": [24], "starts": [0], "places": [-1],
        "seq_lens": [102], "thresholds": [0.0],
    }  # fmt: skip
    assert second.tokens is not None and second.tokens.tolist() == [8]
    assert (first.whole, second.whole) == (True, False)
    mask = worker.selecting.mask(list(lens))
    assert mask.dtype == bool and mask.tolist() == [False, True, True, False, True, False, True]


def test_a_batch_without_selecting_rows(worker: Worker) -> None:
    worker.read("waits", "always")
    assert worker.apart({"a": 1, "b": 2}) == []
    assert worker.selecting.mask(["a", "b"]).tolist() == [False, False] and worker.selecting.mask([]).tolist() == []


@pytest.mark.parametrize(
    ("modes", "unless"),
    [
        ([Mode.REUSE], False),
        ([Mode.REUSE, Mode.REUSE], False),
        ([Mode.REUSE, Mode.SELECT], True),
        ([Mode.CHECK, Mode.REUSE], True),
    ],
)
def test_what_is_read_whole_depends_on_the_selectors_own_rows(worker: Worker, modes: list[Mode], unless: bool) -> None:
    for number, mode in enumerate(modes):
        worker.read(f"{number}", "unless", mode)
    worker.read("select", "dense", Mode.SELECT)
    found = {id(rows.reader): rows.whole for rows in worker.apart(dict.fromkeys([*"01", "select", "plain"], 1))}
    assert found == {id(worker.readers["unless"]): unless, id(worker.readers["dense"]): False}


@pytest.mark.parametrize("threshold", [0.0, 1.0, 0.95, 0.1, 1 / 3, 1e-30, 2**-149])
def test_thresholds_keep_their_bits(worker: Worker, threshold: float) -> None:
    """They travel among whole numbers."""
    worker.read("a", "always", threshold=threshold)
    (found,) = worker.apart({"a": 1})
    graph = worker.fill(Selection("always", True), ["a"], 2)
    expected = torch.tensor([threshold], dtype=torch.float32)
    assert torch.equal(found.rows.thresholds.view(torch.int32), expected.view(torch.int32))
    assert torch.equal(graph.rows.thresholds[:1].view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("contexts", [[1, 1, 1], [4, 4, 4], [5, 4, 3], [33, 100, 7]])
def test_columns_of_scores_are_each_rows_own(worker: Worker, contexts: list[int]) -> None:
    """Whole pages, for as many tokens as the scheduler counts."""
    for name, context in zip("abc", contexts, strict=True):
        worker.read(name, "always", context=context)
    (found,) = worker.apart(dict.fromkeys("abc", 1))
    starts = found.rows.starts.tolist()
    assert all(start % PAGE == 0 for start in starts)
    ends = [start + -(-context // PAGE) * PAGE for start, context in zip(starts, contexts, strict=True)]
    assert starts == [0, *ends[:-1]]


# Rows of graphs


def test_rows_of_a_graph(worker: Worker) -> None:
    """All of the batch, those that select nothing as dense ones; behind them rows without a request."""
    identity, slots = worker.selecting.tables.identity, worker.slots
    worker.read("a", "dense", context=9, tokens=6, place=2, threshold=0.5)
    worker.read("packed", "dense", Mode.REUSE, context=30, tokens=7, place=4)
    found = worker.fill(Selection("dense", True), ["plain", "packed", "a", "other"], 5)
    assert (found.reader, found.whole, found.tokens) == (worker.readers["dense"], True, None)
    assert numbers(found.rows) == {
        "slots": [identity, slots["packed"], identity, slots["other"], -1],
        "modes": [Mode.DENSE, Mode.REUSE, Mode.SELECT, Mode.DENSE, 0],
        "tokens": [0, 7, 6, 0, 0],
        "starts": [0, 0, 32, 0, 0],
        "places": [-1, 4, 2, -1, -1],
        "seq_lens": [100, 101, 102, 103, 0],
        "thresholds": [0.0, 0.0, 0.5, 0.0, 0.0],
    }


def test_a_graph_is_captured_without_requests(worker: Worker) -> None:
    found = worker.fill(Selection("unless", False), [], 3)
    assert (found.whole, len(found.rows)) == (False, 3)
    said = numbers(found.rows)
    assert said.pop("slots") == said.pop("places") == [-1] * 3 and said.pop("seq_lens") == [0] * 3
    assert all(values == [0] * 3 for values in said.values())


def test_replays_read_what_a_capture_has_seen(worker: Worker) -> None:
    """The same places in memory, of which each step writes all, by one copy; none is left of an earlier step."""
    selection = Selection("always", True)
    captured = worker.fill(selection, [], 4).rows
    for name in "abcd":
        worker.read(name, "always", context=9, tokens=6, place=2, threshold=0.5)
    for names in (["a", "b", "c", "d"], ["plain", "a"], ["a"], ["c", "b", "plain"]):
        rows = worker.fill(selection, names, 4).rows
        for field in ("slots", "modes", "tokens", "starts", "places", "pooling", "thresholds"):
            ours, theirs = getattr(captured, field), getattr(rows, field)
            assert ours.data_ptr() == theirs.data_ptr() and torch.equal(ours, theirs)
            assert ours.is_contiguous(), "kernels count in whole numbers"
        modes = [Mode.DENSE if name == "plain" else Mode.SELECT for name in names]
        assert captured.modes.tolist() == modes + [0] * (4 - len(names))
        assert captured.slots[len(names) :].tolist() == [-1] * (4 - len(names))
    assert len(worker.sent) == 5 and all(out is worker.selecting.fixed for _, out in worker.sent)
    assert {data.shape for data, _ in worker.sent} == {(7, ROWS)}


def test_vllms_tensors_are_read_where_they_are(worker: Worker) -> None:
    common = batch([1, 1, 0])
    rows = worker.selecting.fill(Selection("always", True), common, [], worker.page_tables([]), worker.send).rows
    assert rows.seq_lens.data_ptr() == common.seq_lens.data_ptr() and len(rows.seq_lens) == 3
    assert rows.block_table.data_ptr() == common.block_table_tensor.data_ptr()


# Graphs


def test_every_kind_of_graph(worker: Worker) -> None:
    assert worker.selecting.graphs() == [
        (Selection("always", True), ROWS),
        (Selection("dense", False), ROWS),
        (Selection("dense", True), ROWS),
        (Selection("unless", False), ROWS),
        (Selection("unless", True), ROWS),
    ]


def test_selectors_own_kinds_of_graphs() -> None:
    """As the method `whole` of a reader, for which it needs no tensor, answers."""
    own = {name: selector.reader.__new__(selector.reader) for name, selector in selectors().items()}
    for reader in own.values():
        reader.place = SimpleNamespace(rows=ROWS)  # type: ignore[assignment]
    compressor: Any = SimpleNamespace(pages=torch.zeros(1))
    found = [selection for selection, _ in Selecting(compressor, own, ()).graphs()]
    both = {"recycled", "tidal", "lessismore", "loki", "quest"}
    kinds = {name: [0, 1] if name in both else [1] for name in own} | {"recycled": [0, 1, 2]}
    assert found == [Selection(name, whole) for name in own for whole in kinds[name]]
    assert [mode for mode in Mode if not own["recycled"].whole(mode)] == [Mode.REUSE]
    assert [mode for mode in Mode if own["recycled"].whole(mode) == 2] == [Mode.CHECK]
    assert all([mode for mode in Mode if own[name].whole(mode)] == [Mode.DENSE] for name in both - {"recycled"})


@pytest.mark.parametrize(
    ("reads", "rows", "expected"),
    [
        ({"a": ("always", Mode.SELECT)}, "a", Selection("always", True)),
        ({"a": ("dense", Mode.SELECT)}, "a", Selection("dense", False)),
        ({"a": ("dense", Mode.SELECT)}, "ab", Selection("dense", True)),
        ({"a": ("unless", Mode.REUSE)}, "a", Selection("unless", False)),
        ({"a": ("unless", Mode.REUSE), "b": ("unless", Mode.REUSE)}, "ab", Selection("unless", False)),
        ({"a": ("unless", Mode.REUSE), "b": ("unless", Mode.CHECK)}, "ab", Selection("unless", True)),
        ({"a": ("unless", Mode.REUSE)}, "abcde", Selection("unless", True)),
        ({"a": ("always", Mode.SELECT)}, "abcdef", None),
        ({"a": ("unless", Mode.REUSE), "b": ("always", Mode.SELECT)}, "ab", None),
        ({}, "a", None),
    ],
)
def test_which_graph_a_step_wants(
    worker: Worker, reads: dict[str, tuple[str, Mode]], rows: str, expected: Selection | None
) -> None:
    for name, (selector, mode) in reads.items():
        worker.read(name, selector, mode)
    assert worker.selecting.graph(dict.fromkeys(rows, 1)) == expected
    assert worker.selecting.graph({**dict.fromkeys(rows, 1), "prompt": 2}) is None


def test_graphs_have_names() -> None:
    """For the log; by which nothing is found."""
    assert str(Selection("recycled", 2)) == "recycled 2"


def test_without_selectors_there_is_nothing() -> None:
    compressor: Any = SimpleNamespace(pages=torch.zeros(1))
    selecting = Selecting(compressor, {}, ())
    assert selecting.graphs() == [] and selecting.fixed.shape == (7, 0) and selecting.graph({"a": 1}) is None


# Caches shown to readers


def test_a_prompt_is_shown(worker: Worker) -> None:
    worker.selecting.prepare(Prepare("a", "dense", 3, [7, 2, 9], 0, 10))
    ((pages, lengths, caches, state),) = worker.readers["dense"].prepared
    expected = torch.stack([GEOMETRY.pages_of(layer, torch.tensor([7, 2, 9])) for layer in range(LAYERS)])
    assert pages.dtype == lengths.dtype == torch.int64 and torch.equal(pages, expected)
    assert lengths.tolist() == [[10, 10]] * LAYERS and state == 3
    assert caches == worker.selecting.caches and not worker.readers["always"].prepared


def test_a_compacted_cache_is_shown(worker: Worker) -> None:
    """Of each head the pages it was given, then those since block 5, with ten tokens."""
    worker.selecting.prepare(Prepare("packed", "always", -1, [7, 2, 9], 5, 30))
    ((pages, lengths, _, state),) = worker.readers["always"].prepared
    assert torch.equal(lengths, worker.counts * PAGE + 10) and state == -1
    pool = GEOMETRY.pool_of(torch.tensor([10, 11])).tolist()
    for layer in range(LAYERS):
        later = GEOMETRY.pages_of(layer, torch.tensor([7, 2, 9])).tolist()
        for head in range(HEADS):
            count = int(worker.counts[layer, head])
            own, pool = pool[:count], pool[count:]
            assert pages[layer, head, : count + 3].tolist() == own + later[head]
    found, filled = worker.readers["always"].in_use(pages[1], lengths[1])
    assert filled.tolist() == [4, 4, 2] + [4] * 4 + [4, 4, 2]
    assert found.tolist() == pages[1, 0, :3].tolist() + pages[1, 1, :7].tolist()


def test_readers_run_with_the_rows_of_a_graph_without_requests(worker: Worker) -> None:
    """What is captured must touch nothing: no page, no list, whatever stood in the lengths."""
    rows = worker.fill(Selection("always", True), [], 3).rows
    rows.seq_lens.fill_(1)
    pages, lengths = torch.full((3 * HEADS, 8), 31, dtype=torch.int32), torch.ones(3 * HEADS, dtype=torch.int32)
    naive.full_rows(pages, lengths, rows, worker.selecting.caches[0], int(~Mode(0)))
    assert lengths.tolist() == [0] * 6 and bool((pages == 31).all())
    assert naive.newest_slots(rows, worker.selecting.caches[0]).tolist() == [[0, 0]] * 3
