"""One worker's compression from step to step: what it does with orders, and what it says of the batch."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from attention_plugins.decode.rows import Mode
from attention_plugins.decode.schedule import Prepare, Read
from attention_plugins.vllm_adapter.prefilling import NaiveExecutor, Prefilling
from attention_plugins.vllm_adapter.runtime import BatchKind, CompressionRuntime, runtime_for, set_runtime
from attention_plugins.vllm_adapter.selection import Selecting, Selection
from kvcache.orders import Compact, Start
from kvcache.vllm_adapter.orders import StepOrders, attach_orders
from tests.kvcache.synthetic import WINDOW, PagedCache, words

DENSE, COMPACTED, MIXED, SELECTED, _ = BatchKind
POLICIES = {"random": words("random", 60), "snapkv": words("snapkv", 60)}


class Worker:
    """A runtime over a cache with one known prompt, which all requests have."""

    def __init__(self, slots: int = 2) -> None:
        self.cache = PagedCache(100)
        self.compressor = self.cache.compressor(slots)
        self.rows: list[str] = []
        self.reader: Any = SimpleNamespace(
            place=SimpleNamespace(rows=2), whole=lambda modes: True, prepare=lambda *given: self.shown.append(given)
        )
        self.shown: list[tuple[Any, ...]] = []
        readers: dict[str, Any] = {"quest": self.reader, "tidal": self.reader}
        selecting = Selecting(self.compressor, readers, ())
        prefilling = Prefilling((), torch.float32, {}, NaiveExecutor())
        self.runtime = CompressionRuntime(self.compressor, selecting, prefilling, lambda common: self.rows)
        self.free = self.cache.free.tolist()

    def start(self, name: str, policy: str = "random") -> Start:
        plan = self.cache.plan(POLICIES[policy])
        assert plan is not None
        return Start(name, POLICIES[policy], plan)

    def compact(self, name: str) -> Compact:
        plan = self.start(name).plan
        targets, self.free = self.free[: plan.kept_pages], self.free[plan.kept_pages :] + self.free[: plan.kept_pages]
        return Compact(name, self.cache.blocks.tolist(), targets, self.cache.prompt_len)

    def begin(
        self,
        scheduled: Iterable[str] = (),
        *,
        start: Iterable[Start] = (),
        compact: Iterable[Compact] = (),
        finished: Iterable[str] = (),
        preempted: Iterable[str] | None = None,
        reads: dict[str, str] | None = None,
        prepare: Iterable[Prepare] = (),
        orders: bool = True,
    ) -> tuple[BatchKind, bool]:
        """Begin a step of these requests; what the batch is said to be, and whether queries are recorded."""
        output = SimpleNamespace(
            finished_req_ids=set(finished),
            preempted_req_ids=None if preempted is None else set(preempted),
            num_scheduled_tokens=dict.fromkeys(scheduled, 1),
            scheduled_new_reqs=[],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=list(scheduled), num_computed_tokens=[self.cache.prompt_len - 1 for _ in scheduled]
            ),
        )
        if orders:
            said = {
                name: Read(name, selector, Mode.SELECT, 300, 64, 0.0, -1) for name, selector in (reads or {}).items()
            }
            attach_orders(output, StepOrders(list(start), list(compact), prepare=list(prepare), reads=said))
        self.runtime.begin_step(output)
        assert self.runtime.in_step
        return self.runtime.kind, self.runtime.recording

    def step(self, *args: Any, **kwargs: Any) -> tuple[BatchKind, bool]:
        """A whole step; afterwards nothing is left of it."""
        found = self.begin(*args, **kwargs)
        self.runtime.graph = found[0]
        self.runtime.end_step()
        runtime = self.runtime
        assert (runtime.in_step, runtime.kind, runtime.recording, runtime.graph) == (False, DENSE, False, None)
        assert runtime.wanted is None and runtime.selecting.reads == {}
        return found

    def slots(self, *rows: str) -> list[int]:
        self.rows = list(rows)
        found = self.runtime.slots(None)
        assert found.dtype == np.int32
        return found.tolist()


def test_nobody_is_there() -> None:
    worker = Worker()
    assert not worker.runtime.in_step
    assert worker.step() == (DENSE, False)
    assert worker.step(orders=False) == (DENSE, False)
    assert worker.step(["a", "b"], orders=False) == (DENSE, False), "requests without a policy are never heard of"
    assert worker.step(["a"], finished=["b"], preempted=["c"]) == (DENSE, False)
    assert worker.slots("a", "b") == [-1, -1] and worker.slots() == []
    assert worker.runtime.take_reports() == []


def test_prompts_are_dense_until_they_are_compacted() -> None:
    worker = Worker()
    assert worker.step(["a"], start=[worker.start("a")]) == (DENSE, False)
    assert worker.step(["a", "plain"]) == (DENSE, False)
    assert worker.slots("a", "plain") == [-1, -1]
    assert worker.step(["a", "plain"], compact=[worker.compact("a")]) == (MIXED, False)
    assert worker.slots("plain", "a") == [-1, worker.compressor.slot("a")]
    assert worker.step(["a"]) == (COMPACTED, False)
    assert worker.step(["plain"]) == (DENSE, False), "the compacted one waits"
    assert worker.step() == (DENSE, False)
    assert worker.step(["a"], orders=False) == (COMPACTED, False)


def test_all_rows_have_to_be_compacted() -> None:
    worker = Worker()
    worker.step(["a", "b", "c"], start=[worker.start(name) for name in "abc"])
    assert worker.step(["a", "b", "c"], compact=[worker.compact("a")]) == (MIXED, False)
    assert worker.step(["a", "b"], compact=[worker.compact("b")]) == (COMPACTED, False)
    assert worker.step(["c", "b", "a"]) == (MIXED, False)
    assert worker.step(["c"]) == (DENSE, False)
    slots = worker.slots("c", "b", "a", "plain", "b")
    assert slots == [-1, slots[1], slots[2], -1, slots[1]] and sorted(slots[1:3]) == [0, 1]


def test_queries_are_recorded_while_a_scheduled_prompts_window_is_open() -> None:
    worker = Worker()
    assert worker.step(["w"], start=[worker.start("w", "snapkv")]) == (DENSE, True)
    assert worker.step(["w", "plain"], start=[worker.start("a")]) == (DENSE, True)
    assert worker.step(["plain", "a"]) == (DENSE, False), "it waits"
    assert worker.step(["w", "a"], compact=[worker.compact("a")]) == (MIXED, True)
    assert worker.step(["a"]) == (COMPACTED, False)
    worker.cache.feed(worker.compressor, [worker.cache.prompt_len], "w")
    assert worker.step(["w", "a"], compact=[worker.compact("w")]) == (COMPACTED, False), "its window is closed now"
    assert worker.step(["w", "plain"]) == (MIXED, False)


def test_start_and_compaction_in_one_step() -> None:
    """Starts come first: a prompt that was found in the prefix cache as a whole has no step of its own."""
    worker = Worker()
    assert worker.step(["a"], start=[worker.start("a")], compact=[worker.compact("a")]) == (COMPACTED, False)
    assert worker.slots("a") == [worker.compressor.slot("a")] != [-1]
    assert worker.step(
        ["a", "b", "plain"], start=[worker.start("b")], compact=[worker.compact("b")]
    ) == (MIXED, False)  # fmt: skip
    assert [report.finish().request_id for report in worker.runtime.take_reports()] == ["a", "b"]
    assert worker.runtime.take_reports() == []


def test_finished_and_preempted_requests_give_their_tables_back() -> None:
    """Before new ones need them; a preempted request may start again in the same step."""
    worker = Worker(slots=1)
    worker.step(["a"], start=[worker.start("a")], compact=[worker.compact("a")])
    assert worker.step(["b"], start=[worker.start("b")], compact=[worker.compact("b")], finished=["a"]) == (
        COMPACTED, False,
    )  # fmt: skip
    assert worker.slots("a", "b") == [-1, 0] and set(worker.compressor.requests) == {"b"}
    assert worker.step(["c"], start=[worker.start("c")], compact=[worker.compact("c")], preempted=["b"]) == (
        COMPACTED, False,
    )  # fmt: skip
    assert worker.slots("b", "c") == [-1, 0] and set(worker.compressor.requests) == {"c"}
    assert worker.step(["c", "plain"], start=[worker.start("c", "snapkv")], preempted=["c"]) == (DENSE, True)
    assert worker.slots("c") == [-1]
    assert worker.step(["c"], finished=["c", "never heard of"]) == (DENSE, False)
    assert worker.compressor.requests == {}
    worker.step(["d"], start=[worker.start("d")], compact=[worker.compact("d")])
    assert worker.slots("d") == [0]


def test_reports_wait_until_they_are_taken() -> None:
    worker = Worker()
    worker.step(["a", "b"], start=[worker.start("a"), worker.start("b")])
    worker.step(["a", "b"], compact=[worker.compact("b")])
    worker.step(["a", "b"], compact=[worker.compact("a")])
    assert [report.finish().request_id for report in worker.runtime.take_reports()] == ["b", "a"]
    worker.step(["a", "b"])
    assert worker.runtime.take_reports() == []


def test_a_compaction_that_fails_is_not_hidden() -> None:
    worker = Worker()
    worker.step(["w"], start=[worker.start("w", "snapkv")])
    with pytest.raises(RuntimeError, match=f"{WINDOW * 4} window_queries of request w were not seen"):
        worker.begin(["w"], compact=[worker.compact("w")])


@pytest.mark.parametrize(
    ("scheduled", "reads", "wanted"),
    [
        ("a", {"a": "quest"}, Selection("quest", True)),
        (["a", "packed"], {"a": "tidal"}, Selection("tidal", True)),
        (["packed"], {"packed": "quest"}, Selection("quest", True)),
        ("ab", {"a": "tidal", "b": "quest"}, None),
        (["a", "b", "packed"], {"a": "quest"}, None),
    ],
)
def test_a_row_that_selects_makes_its_batch_another_kind(
    scheduled: Iterable[str], reads: dict[str, str], wanted: Selection | None
) -> None:
    """Whatever its other rows are: in no other kind of batch, and no graph of one, would it select."""
    worker = Worker()
    worker.step(["packed"], start=[worker.start("packed")], compact=[worker.compact("packed")])
    assert worker.begin(scheduled, reads=reads) == (SELECTED, False)
    assert worker.runtime.wanted == wanted
    worker.rows = list(scheduled)
    mask, _ = worker.runtime.selected(batch(len(worker.rows)), worker.runtime.slots(batch(len(worker.rows))))
    assert mask.tolist() == [name in reads for name in scheduled]
    worker.runtime.end_step()
    assert worker.begin(scheduled, reads={})[0] is not SELECTED
    compacted: Any = {"packed"} & set(scheduled) and (COMPACTED if set(scheduled) == {"packed"} else MIXED)
    assert worker.runtime.wanted == (compacted or None)
    mask, found = worker.runtime.selected(batch(len(worker.rows)), worker.runtime.slots(batch(len(worker.rows))))
    assert not mask.any() and found == []


def batch(rows: int) -> Any:
    """One token for each row."""
    return SimpleNamespace(
        query_start_loc_cpu=torch.arange(rows + 1, dtype=torch.int32),
        seq_lens=torch.full((rows,), 300, dtype=torch.int32),
        block_table_tensor=torch.zeros(rows, 4, dtype=torch.int32),
    )


def test_readers_are_shown_a_cache_after_its_compaction() -> None:
    worker = Worker()
    worker.step(["a"], start=[worker.start("a")])
    compact = worker.compact("a")
    first = worker.start("a").plan.full_pages
    prepare = Prepare("a", "quest", 5, worker.cache.blocks[first:].tolist() or [0], first, worker.cache.prompt_len)
    worker.step(["a"], compact=[compact], prepare=[prepare], reads={"a": "quest"})
    ((_, lengths, _, state),) = worker.shown
    size = worker.cache.geometry.page_size
    assert torch.equal(lengths, worker.compressor.page_counts("a") * size + worker.cache.prompt_len - first * size)
    assert state == 5


def test_rows_of_a_graph_are_empty_at_its_capture() -> None:
    """Outside a step nobody is asked who is in the batch."""
    worker = Worker()
    worker.rows = ["a", "b"]
    common, sent = batch(2), list[Any]()
    common.num_reqs = 2
    found = worker.runtime.fill_selected(Selection("quest", True), common, lambda data, out: sent.append(data))
    assert len(found.rows) == 2 and sent[0][0].tolist() == [-1, -1] and not sent[0][1].any()
    worker.begin(["a", "b"], reads={"b": "quest"})
    worker.runtime.fill_selected(Selection("quest", True), common, lambda data, out: sent.append(data))
    identity = worker.compressor.tables.identity
    assert sent[1][0].tolist() == [identity] * 2 and sent[1][1].tolist() == [Mode.DENSE, Mode.SELECT]


def test_a_runtime_is_found_by_its_configuration() -> None:
    worker, config, other = Worker(), SimpleNamespace(), SimpleNamespace()
    set_runtime(config, worker.runtime)
    assert runtime_for(config) is worker.runtime and runtime_for(other) is None
    set_runtime(config, None)
    set_runtime(config, None)
    assert runtime_for(config) is None
