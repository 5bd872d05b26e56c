"""Any order of admitting, chunking, compacting, decoding, preempting, aborting, sharing and evicting leaves the block
pool and the page tables whole: vLLM's scheduler and managers with ours in them, a hypothesis state machine, no model.

What is checked after every step is in `scheduler_world` and `kvcache.audit`. `--model-steps` runs more of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

pytest.importorskip("vllm")

from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from kvcache.tables import PageTables
from kvcache.vllm_adapter.manager import CompressibleAttentionManager
from kvcache.vllm_adapter.scheduler import CompressionScheduler
from tests.kvcache.scheduler_world import World
from tests.tiny_model import write_tiny_model

LONGEST, MOST = 448, 6
LEAST = 400
"""Steps of an example."""
POLICIES: list[dict[str, Any]] = [
    {},
    {},
    {"policy": "streamingllm", "budget": 64},
    {"policy": "streamingllm", "budget": 64, "interval": 32},
    {"policy": "streamingllm", "budget": 90, "interval": 16, "suffix": 20},
    {"policy": "random", "budget": 70, "suffix": 33},
    {"policy": "l2norm", "budget": "40%"},
    {"policy": "l2norm", "budget": 100, "interval": 48},
    {"policy": "snapkv", "budget": 100, "window": 20},
    {"policy": "snapkv", "budget": 84, "window": 8, "interval": 32, "suffix": 7},
    {"policy": "adakv", "budget": 96, "window": 9},
    {"policy": "pyramidkv", "budget": 110, "window": 16},
    {"policy": "raas", "budget": 96, "interval": 16},
]
SELECTORS: list[dict[str, Any]] = [
    {},
    {},
    {"selector": "quest", "tokens": 32, "min_context": 0},
    {"selector": "recycled", "tokens": 32, "stride": 4, "min_context": 0},
]
PATTERNS: list[dict[str, Any]] = [
    {},
    {},
    {},
    {"pattern": "streaming", "sinks": 16, "window": 64, "min_context": 100},
    {"pattern": "streaming", "sinks": 16, "window": 128, "min_context": 0},
]
METHODS = {"kv_cache": POLICIES, "decode_attention": SELECTORS, "prefill_attention": PATTERNS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def config(folder: Path) -> Any:
    """vLLM's, of a tiny model that is never loaded."""
    return EngineArgs(
        model=str(folder), skip_tokenizer_init=True, max_model_len=LONGEST, max_num_seqs=MOST, block_size=16,
        max_num_batched_tokens=512, enable_prefix_caching=True, scheduling_policy="priority",
        additional_config={"longreach": {"audit": 1, "decode": {"selectors": ["quest", "recycled"], "states": 3}}},
    ).create_engine_config()  # fmt: skip


class Machine(RuleBasedStateMachine):
    """Attributes:
    config, hybrid, ahead: of the world.
    done: steps of all examples so far, each with all checks.
    seen: what happened in them.
    """

    config: Any = None
    hybrid = False
    ahead = 0
    done = 0
    seen: ClassVar[Counter[str]] = Counter()

    @initialize(more=st.sampled_from([0, 5, 20, 60, 200]), threshold=st.sampled_from([0, 0, 48, 128, 200]))
    def begin(self, more: int, threshold: int) -> None:
        """A pool that the longest request fits in, or somewhat more."""
        blocks = (LONGEST // 16 + 4) * (1 + self.hybrid) + more
        self.config.scheduler_config.long_prefill_token_threshold = threshold
        self.world = World(self.config, blocks=blocks, hybrid=self.hybrid, ahead=self.ahead)

    @rule(number=st.integers(1, 4), seed=st.integers(0, 1 << 32))
    def admit(self, number: int, seed: int) -> None:
        """Requests that begin as others of their family do."""
        choose = Random(seed)
        for _ in range(number):
            shared, stop = choose.randrange(0, 200, 7), choose.randrange(120)
            self._admit(choose, choose.randrange(2), shared, choose.choice((1, 5, 20, 60, 150)), stop)

    @precondition(lambda self: self.world.ended)
    @rule(number=st.integers(1, 3), seed=st.integers(0, 1 << 32))
    def follow_up(self, number: int, seed: int) -> None:
        """Prompts that go on from an earlier one's answer."""
        choose = Random(seed)
        for _ in range(number):
            parent = choose.choice(self.world.ended[-4:])
            shared = max(0, parent.prompt_len + len(parent.outputs) - choose.randrange(20))
            self._admit(choose, parent, shared, choose.choice((1, 4, 20, 60)), 200)

    def _admit(self, choose: Random, parent: Any, shared: int, own: int, stop: int) -> None:
        answer = choose.choice((1, 2, 10, 30, 60, 90))
        if len(self.world.scheduler.requests) >= 2 * MOST or shared + own + answer > LONGEST:
            return
        asked = {name: one for name, known in METHODS.items() if (one := choose.choice(known))}
        self.world.admit(
            parent, shared, own, answer, stop, asked, priority=choose.randrange(4),
            salt=choose.choice((None, None, None, "a", "b")), skip_cache=choose.random() < 0.1,
        )  # fmt: skip

    @precondition(lambda self: self.world.scheduler.requests)
    @rule(times=st.integers(1, 90))
    def run(self, times: int) -> None:
        for _ in range(times):
            self.world.step()

    @rule(stage=st.sampled_from(["schedule", "execute", "process"]))
    def move(self, stage: str) -> None:
        """One stage of a step, where there is something for it."""
        world = self.world
        if {"schedule": world.may_schedule, "execute": world.scheduled, "process": world.executed}[stage]:
            getattr(world, stage)()

    @precondition(lambda self: self.world.scheduler.requests)
    @rule(which=st.integers(0, 2 * MOST))
    def abort(self, which: int) -> None:
        lives = self.world.lives
        self.world.abort(lives[which % len(lives)])

    @rule(kind=st.sampled_from(["evict", "squeeze", "release", "chunk", "preempt"]), number=st.integers(1, 60))
    def disturb(self, kind: str, number: int) -> None:
        """Evict from the prefix cache, take blocks out of the pool or give them back, cut prompts elsewhere, preempt
        all."""
        if kind == "evict":
            self.world.evict(number)
        elif kind == "squeeze":
            self.world.squeeze(number)
        elif kind == "release":
            self.world.release()
        elif kind == "preempt" and not self.world.taken:
            self.world.preempt_all()
        else:
            self.world.scheduler.max_num_scheduled_tokens = (16, 33, 64, 130, 200, 512)[number % 6]

    def teardown(self) -> None:
        if hasattr(self, "world") and not self.world.broken:
            choose = Random(self.world.steps)
            while self.world.steps < LEAST:
                if choose.random() < 0.05:
                    self._admit(
                        choose, choose.randrange(2), choose.randrange(0, 200, 7), choose.choice((1, 20, 60)), 200
                    )
                self.world.step()
            self.world.finish()
            type(self).done += self.world.steps
            type(self).seen.update(self.world.seen)


CASES: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "asynchronous": {"ahead": 1},
    "hybrid": {"hybrid": True},
    "hybrid-asynchronous": {"hybrid": True, "ahead": 1},
}


def run(case: str, config: Any, steps: int) -> type[Machine]:
    """The machine, after about so many steps."""
    machine = type(case, (Machine,), {**CASES[case], "config": config, "seen": Counter()})
    profile = settings(
        max_examples=-(-steps // LEAST), stateful_step_count=60, derandomize=True, deadline=None, database=None,
        phases=(Phase.generate,), suppress_health_check=list(HealthCheck), print_blob=False, report_multiple_bugs=False,
    )  # fmt: skip
    run_state_machine_as_test(machine, settings=profile)
    return machine


@pytest.mark.parametrize("case", CASES)
def test_no_order_of_events_breaks_the_cache(case: str, config: Any, steps: int) -> None:
    """At least so many steps in each of four configurations."""
    machine = run(case, config, steps)
    print(case, machine.done, dict(machine.seen))
    assert machine.done >= steps, f"{machine.done} steps"
    missing = {"compactions", "later compactions", "hits", "preemptions", "aborts", "evicted"} - machine.seen.keys()
    assert not missing, f"never happened: {missing}"


Manager, Scheduler = CompressibleAttentionManager, CompressionScheduler


def _skip_release(self: Any, *args: Any, **kwargs: Any) -> None:
    """A compacted prompt's blocks are never given back."""


def _release_early(self: Any, request_id: str, processed: int, num_prompt_tokens: int | None = None) -> None:
    """They are given back when the compaction is due, not when it is done."""
    if plan := self.plans.get(request_id):
        self._remove_blocks_in_range(request_id, 0, plan.last_boundary(processed) // plan.page_size)


def _keep_targets(self: Any, request_id: str) -> Any:
    """Target blocks leak when a request ends."""
    return FullAttentionManager.pop_blocks_for_free(self, request_id)


def _count_no_targets(self: Any, *args: Any, **kwargs: Any) -> int:
    """Admission forgets what a compaction will need."""
    return int(FullAttentionManager.get_num_blocks_to_allocate(self, *args, **kwargs))


def _share_all(self: Any, request_id: str) -> None:
    """Answers over a compacted prompt are hashed like any."""


def _hit_all(self: Any, request: Any) -> None:
    """The prefix cache gives tokens that observers wanted to watch."""


def _one_block_late(self: Any, slot: int, first_block: int) -> None:
    """A table that is compacted again goes on one block too late."""
    self.first_block[slot].fill_(first_block + 1)


def _wrong_slots(self: Any, slot: int, row: Any, rank: Any) -> Any:
    """A compaction writes off by one in its pages."""
    return TOKEN_SLOTS(self, slot, row, rank + 1)


def _forget_nothing(self: Any, request_id: str) -> None:
    """A worker keeps page tables of requests that have ended."""


def _plan_for_ever(self: Any, request_id: str) -> None:
    """Plans of requests that have ended stay."""


TOKEN_SLOTS = PageTables.token_slots
FAULTS: list[tuple[Any, str, Any]] = [
    (Manager, "remove_skipped_blocks", _skip_release),
    (Manager, "remove_skipped_blocks", _release_early),
    (Manager, "pop_blocks_for_free", _keep_targets),
    (Manager, "get_num_blocks_to_allocate", _count_no_targets),
    (Manager, "shareable", _share_all),
    (Manager, "drop_plan", _plan_for_ever),
    (Scheduler, "_hit_limit", _hit_all),
    (PageTables, "advance", _one_block_late),
    (PageTables, "token_slots", _wrong_slots),
    (PageTables, "release", _forget_nothing),
]


@pytest.mark.parametrize(("owner", "name", "fault"), FAULTS, ids=[fault.__name__.strip("_") for _, _, fault in FAULTS])
def test_the_machine_finds_faults(
    owner: Any, name: str, fault: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these, put into the code, is found within a few thousand steps."""
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises((AssertionError, RuntimeError, ValueError, IndexError)) as found:
        run("synchronous", config, 12_000)
    print(f"{fault.__name__}: {type(found.value).__name__}: {str(found.value)[:200]}")


@pytest.fixture
def steps(request: pytest.FixtureRequest) -> Iterator[int]:
    """Of each configuration: 100,000 together unless the command line says otherwise."""
    yield int(request.config.getoption("--model-steps")) // len(CASES)
