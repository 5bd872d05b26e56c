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

from tests.kvcache.scheduler_world import World
from tests.tiny_model import write_tiny_model

LONGEST, MOST = 448, 6
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


def engine_config(folder: Path) -> Any:
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

    @initialize(more=st.integers(0, 60), threshold=st.sampled_from([0, 0, 48, 128, 200]))
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
            shared, stop = choose.randrange(200), choose.randrange(120)
            self._admit(choose, choose.randrange(3), shared, choose.randrange(1, 180), stop)

    @precondition(lambda self: self.world.ended)
    @rule(number=st.integers(1, 3), seed=st.integers(0, 1 << 32))
    def follow_up(self, number: int, seed: int) -> None:
        """Prompts that go on from an earlier one's answer."""
        choose = Random(seed)
        for _ in range(number):
            parent = choose.choice(self.world.ended[-8:])
            shared = max(0, parent.prompt_len + len(parent.outputs) - choose.randrange(60))
            self._admit(choose, parent, shared, choose.randrange(1, 60), 200)

    def _admit(self, choose: Random, parent: Any, shared: int, own: int, stop: int) -> None:
        answer = choose.randrange(1, 90)
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

    @precondition(lambda self: self.world.may_schedule)
    @rule()
    def schedule(self) -> None:
        self.world.schedule()

    @precondition(lambda self: self.world.scheduled)
    @rule()
    def execute(self) -> None:
        self.world.execute()

    @precondition(lambda self: self.world.executed)
    @rule()
    def process(self) -> None:
        self.world.process()

    @precondition(lambda self: self.world.scheduler.requests)
    @rule(which=st.integers(0, 2 * MOST))
    def abort(self, which: int) -> None:
        lives = self.world.lives
        self.world.abort(lives[which % len(lives)])

    @precondition(lambda self: self.world.scheduler.running and not self.world.taken)
    @rule()
    def preempt_all(self) -> None:
        self.world.preempt_all()

    @rule(number=st.integers(1, 60))
    def evict(self, number: int) -> None:
        self.world.evict(number)

    @rule(number=st.integers(1, 40))
    def squeeze(self, number: int) -> None:
        self.world.squeeze(number)

    @precondition(lambda self: self.world.taken)
    @rule()
    def release(self) -> None:
        self.world.release()

    @rule(tokens=st.sampled_from([16, 33, 64, 130, 200, 512]))
    def chunk(self, tokens: int) -> None:
        self.world.scheduler.max_num_scheduled_tokens = tokens

    def teardown(self) -> None:
        if hasattr(self, "world") and not self.world.broken:
            self.world.finish()
            type(self).done += self.world.steps
            type(self).seen.update(self.world.seen)


CASES: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "asynchronous": {"ahead": 1},
    "hybrid": {"hybrid": True},
    "hybrid-asynchronous": {"hybrid": True, "ahead": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_no_order_of_events_breaks_the_cache(case: str, folder: Path, steps: int) -> None:
    """At least so many steps in each of four configurations."""
    machine = type(case, (Machine,), {**CASES[case], "config": engine_config(folder), "seen": Counter()})
    examples, rules = steps // 200 + 3, 60
    profile = settings(
        max_examples=examples, stateful_step_count=rules, derandomize=True, deadline=None, database=None,
        phases=(Phase.generate,), suppress_health_check=list(HealthCheck), print_blob=False, report_multiple_bugs=False,
    )  # fmt: skip
    run_state_machine_as_test(machine, settings=profile)
    print(machine.done, dict(machine.seen))
    assert machine.done >= steps, f"{machine.done} steps"
    missing = {"compactions", "later compactions", "hits", "preemptions", "aborts", "evicted"} - machine.seen.keys()
    assert not missing, f"never happened: {missing}"


@pytest.fixture
def steps(request: pytest.FixtureRequest) -> Iterator[int]:
    """Of each configuration: 100,000 together unless the command line says otherwise."""
    yield int(request.config.getoption("--model-steps")) // len(CASES)
