"""What the scheduler decides of a request alone: its plan, where its prompt stops, its orders, what a client is told.

The rest is vLLM's; tests/engine runs both together.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from attention_plugins.decode.rows import Mode
from attention_plugins.decode.schedule import Prepare, Read, ReadSchedule
from attention_plugins.decode.settings import DecodeSettings
from kvcache.orders import Compact, CompactionReport
from kvcache.plan import RetentionPlan
from kvcache.usage import POOL, CompressionTotals

pytest.importorskip("vllm")

from vllm.v1.core.sched.scheduler import Scheduler

from attention_plugins.prefill.orders import PatternReport
from attention_plugins.prefill.usage import PrefillTotals
from kvcache.vllm_adapter.orders import StepOrders
from kvcache.vllm_adapter.scheduler import CompressionScheduler, _Compression

PAGE = 16


class Alone(CompressionScheduler):
    """Without an engine: `blocks` in the pool beside the null block."""

    def __init__(self, blocks: int = 1000) -> None:
        self.planned: dict[str, tuple[RetentionPlan, int]] = {}
        self.kv_blocks: Any = SimpleNamespace(
            block_size=PAGE,
            set_plan=lambda name, plan, prompt_len: self.planned.update({name: (plan, prompt_len)}),
            req_to_blocks={},
            target_blocks={},
        )
        self.kv_cache_manager: Any = SimpleNamespace(block_pool=SimpleNamespace(num_gpu_blocks=blocks + 1))
        self.block_bytes = 1000
        self.beside: Any = SimpleNamespace(managers=[], most_blocks=lambda tokens: 0)
        self.compressions = {}
        self.compression_totals = CompressionTotals()
        self.decode_settings = DecodeSettings(("recycled", "quest"))
        self.reads = ReadSchedule(states=4, capacity=10_000, page_size=PAGE)
        self.requests: dict[str, Any] = {}
        self.prefills = {}
        self.prefill_totals = PrefillTotals()
        self.num_layers, self.audit_every = 4, 0
        self.max_num_scheduled_tokens, self.max_num_running_reqs = 512, 256
        self.scheduler_config: Any = SimpleNamespace(long_prefill_token_threshold=0)

    def plan(self, words: dict[str, Any] | None, prompt_len: int = 300, max_tokens: int = 500, **other: Any) -> Any:
        """Give a request its plan; the request."""
        params = SimpleNamespace(extra_args={"kv_cache": words} if words else None)
        request: Any = SimpleNamespace(
            request_id="r",
            num_prompt_tokens=prompt_len,
            max_tokens=max_tokens,
            **{"sampling_params": params, "resumable": False, **other},
        )
        self._plan(request)
        self._plan_prefill(request)
        return request

    def told(self, request: Any) -> dict[str, Any]:
        told = self._told(request)["kv_cache"]
        assert set(told) == {"usage", "totals"} and told["totals"] is self.compression_totals.by_policy
        usage = told["usage"]
        assert isinstance(usage, dict)
        return usage


WORDS = {"policy": "streamingllm", "budget": 100, "interval": 64, "suffix": 20}


class Reading(Alone):
    """A request with a selector, 100 tokens of prompt and as many blocks as it wants."""

    def __init__(self, words: dict[str, Any], policy: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.kv_blocks.own_answers = {}
        asked = {"decode_attention": {"tokens": 32, "min_context": 0, **words}, "kv_cache": policy or {}}
        self.request = self.plan(None, 100, sampling_params=SimpleNamespace(extra_args=asked))
        self.requests["r"] = self.request
        self.kv_blocks.req_to_blocks["r"] = [SimpleNamespace(block_id=1000 + number) for number in range(40)]

    def step(self, context: int, scheduled: int = 1, known: int | None = None) -> StepOrders:
        """A step after which so many tokens are computed, of those known."""
        self.request.num_computed_tokens = context
        self.request.is_prefill_chunk = context < (known or context)
        orders = StepOrders()
        self.reads.begin_step()
        self._read(orders, "r", scheduled)
        return orders

    def modes(self, contexts: range) -> list[Mode]:
        return [self.step(context).reads["r"].mode for context in contexts]


RECYCLED = {"selector": "recycled", "stride": 50}


def test_answers_are_read_by_their_selector() -> None:
    """From the first token behind the prompt, however its chunks were cut."""
    scheduler = Reading(RECYCLED)
    for context, scheduled in ((60, 60), (99, 39), (100, 1)):
        assert not scheduler.step(context, scheduled)
    first = Read("r", "recycled", Mode.SELECT, 101, 32, 0.0, 0, pooling=10, pinned=16, prepare=True)
    assert scheduler.step(101).reads == {"r": first}
    assert scheduler.modes(range(102, 104)) == [Mode.REUSE] * 2
    assert scheduler.kv_blocks.own_answers == {"r": 100}


@pytest.mark.parametrize("known", [None, 117])
@pytest.mark.parametrize("words", [RECYCLED, {"selector": "quest"}])
def test_a_replayed_answer_is_read_whole(words: dict[str, Any], known: int | None) -> None:
    """Also where the token budget of a step has cut off a single token; what was selected before is not there then."""
    scheduler = Reading(words)
    before = scheduler.step(101)
    assert not scheduler.step(102).prepare
    if known:
        assert not scheduler.step(103, 1, known)
    assert not scheduler.step(117, 117 - 103)
    after = scheduler.step(118)
    assert after.reads["r"].mode is Mode.SELECT and len(after.prepare) == len(before.prepare)


def test_a_selectors_reader_is_shown_the_blocks_that_are_filled() -> None:
    """And the one that this step's token begins."""
    scheduler = Reading({"selector": "quest"})
    assert scheduler.step(113).prepare == [Prepare("r", "quest", 0, [*range(1000, 1008)], 0, 112)]
    scheduler.reads.forget("r")
    assert scheduler.step(128).prepare == [Prepare("r", "quest", 0, [*range(1000, 1008)], 0, 127)]


def test_a_compacted_requests_reader_is_shown_what_it_holds() -> None:
    """Blocks behind the compaction; how much a head holds says whether it selects."""
    scheduler = Reading({"selector": "quest", "tokens": 44}, {"policy": "streamingllm", "budget": 48})
    plan = scheduler.compressions["r"].plan
    assert plan and (plan.full_pages, plan.kept_pages) == (6, 3)
    scheduler.compressions["r"].boundary = 100
    assert scheduler.step(101).prepare == [Prepare("r", "quest", 0, [1006], 6, 100)]
    scheduler = Reading({"selector": "quest", "tokens": 53}, {"policy": "streamingllm", "budget": 48})
    scheduler.compressions["r"].boundary = 100
    assert not scheduler.step(101), "3 pages and 5 tokens"
    assert scheduler.step(102).reads


def test_selectors_that_the_server_has_not_enabled_are_left_out() -> None:
    scheduler = Reading({"selector": "loki"})
    assert not scheduler.step(101) and scheduler.kv_blocks.own_answers == {}


def test_a_plan_is_the_policys() -> None:
    scheduler = Alone()
    scheduler.plan(WORDS)
    plan = RetentionPlan(280, PAGE, 5, pinned=4, interval=64, question=(280, 300))
    assert scheduler.planned == {"r": (plan, 300)}
    assert scheduler.compressions["r"].plan == plan and scheduler.compressions["r"].reason is None


@pytest.mark.parametrize("words", [None, {"policy": "none"}, {"policy": "snapkv", "budget": 300}])
def test_requests_that_are_not_compressed(words: dict[str, Any] | None) -> None:
    scheduler = Alone()
    request = scheduler.plan(words)
    assert scheduler.planned == {} and scheduler.compressions["r"].plan is None
    usage = scheduler.told(request)
    assert usage["policy"] == (words or {"policy": "none"})["policy"] and "not_compressed" not in usage
    assert usage["kept_tokens"]["mean"] == 300 and usage["bytes_freed"] == 0


@pytest.mark.parametrize(("max_tokens", "compacts"), [(11, False), (76, False), (77, True), (500, True)])
def test_an_answer_that_cannot_grow_as_far_is_never_compacted(max_tokens: int, compacts: bool) -> None:
    """100 tokens fit the budget: 112 and 64 more have to be there, and a token behind them."""
    scheduler = Alone()
    scheduler.plan({**WORDS, "suffix": 0}, 100, max_tokens)
    assert bool(scheduler.planned) == compacts
    if compacts:
        assert scheduler.planned["r"][0].prompt_len == 176


def test_a_prompt_whose_end_is_not_known_is_not_compressed() -> None:
    scheduler = Alone()
    scheduler.plan(WORDS, resumable=True)
    assert scheduler.planned == {}


@pytest.mark.parametrize(
    ("words", "prompt_len", "needed"),
    [
        (WORDS, 300, 19 + 5),  # 301 tokens, the suffix too; 5 pages stay
        ({**WORDS, "suffix": 0}, 100, 12 + 6),  # 177 tokens when it is compacted first
        ({"policy": "raas", "budget": 64, "interval": 16}, 100, 13 + 11),  # 7 + 4 pages and one more
    ],
)
def test_a_compaction_that_never_fits_is_left_out_and_told(words: dict[str, Any], prompt_len: int, needed: int) -> None:
    scheduler = Alone(needed)
    scheduler.plan(words, prompt_len)
    assert scheduler.planned and scheduler.compressions["r"].reason is None
    scheduler = Alone(needed - 1)
    request = scheduler.plan(words, prompt_len)
    assert scheduler.planned == {} and scheduler.compressions["r"].plan is None
    usage = scheduler.told(request)
    assert usage["not_compressed"] == (
        f"its compaction would need {needed} blocks, the KV cache has {needed - 1}; a smaller budget needs fewer"
    )
    assert usage["policy"] == words["policy"] and usage["kept_tokens"]["mean"] == prompt_len


@pytest.mark.parametrize(
    ("computed", "wanted", "given"),
    [
        (0, 300, 280), (0, 280, 280), (0, 279, 279), (270, 30, 10),  # the suffix waits for the compaction
        (280, 20, 20), (280, 70, 56), (300, 36, 36), (300, 37, 36), (336, 100, 64), (399, 9, 1), (400, 64, 64),
    ],
)  # fmt: skip
def test_chunks_stop_at_boundaries(computed: int, wanted: int, given: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_reserve_prefill_lookahead", lambda self, request, computed, new: new)
    scheduler = Alone()
    request = scheduler.plan(WORDS)
    assert scheduler._reserve_prefill_lookahead(request, computed, wanted) == given
    scheduler.plan(None)
    assert scheduler._reserve_prefill_lookahead(request, computed, wanted) == wanted


@pytest.mark.parametrize("prompt_len", [300, 296])
def test_orders_name_the_blocks_since_the_last_boundary(prompt_len: int) -> None:
    """First all of the prompt's, the partly filled one too, and the targets; later the full ones that came since."""
    scheduler = Alone()
    scheduler.plan(WORDS, prompt_len)
    blocks = [SimpleNamespace(block_id=1000 + number) for number in range(40)]
    scheduler.kv_blocks.req_to_blocks["r"] = blocks
    scheduler.kv_blocks.target_blocks["r"] = [SimpleNamespace(block_id=number) for number in range(5)]
    compression: _Compression = scheduler.compressions["r"]
    first = prompt_len - 20
    full = first // PAGE
    expected = [
        Compact("r", [*range(1000, 1000 + -(-first // PAGE))], [*range(5)], first),
        Compact("r", [*range(1000 + full, 1000 + full + 4)], [], full * PAGE + 64),
        Compact("r", [*range(1000 + full + 4, 1000 + full + 8)], [], full * PAGE + 128),
    ]
    for order in expected:
        assert scheduler._compact("r", compression, order.boundary) == order
        compression.boundary = order.boundary


def test_the_last_compaction_is_told() -> None:
    scheduler = Alone()
    request = scheduler.plan(WORDS)
    for boundary, layers in ((280, [88.0, 88.0]), (336, [80.0, 80.0])):
        report = CompactionReport("r", boundary, layers, 200.0, 4, 0, 0.5)
        scheduler.compressions["r"].report = report
        scheduler.compression_totals.add("streamingllm", report)
    usage = scheduler.told(request)
    assert usage == {
        "policy": "streamingllm", "budget": 100, "sinks": 4, "suffix": 20, "interval": 64, "prompt_tokens": 300,
        "compacted_tokens": 336, "kept_tokens": {"mean": 80.0, "min": 80.0, "max": 80.0}, "bytes_held": 5000,
        "bytes_freed": 16000,
    }  # fmt: skip
    assert scheduler._told(request)["kv_cache"]["totals"]["streamingllm"]["compactions"] == 2


PATTERN = {"pattern": "streaming", "sinks": 16, "window": 64, "min_context": 300}


def prefilling(scheduler: Alone, prompt_len: int, salt: str | None = None, **words: Any) -> Any:
    """A request with a pattern."""
    params = SimpleNamespace(extra_args={"prefill_attention": {**PATTERN, **words}})
    hashed: list[str] = []
    request = scheduler.plan(
        None,
        prompt_len,
        sampling_params=params,
        cache_salt=salt,
        block_hashes=["old"],
        update_block_hashes=lambda: hashed.append("again"),
    )
    scheduler.requests["r"], request.hashed = request, hashed
    return request


def test_prompts_with_a_pattern_have_a_part_of_the_prefix_cache_of_their_own() -> None:
    salts = {
        prefilling(Alone(), 300, salt, **words).cache_salt for salt in (None, "mine") for words in ({}, {"window": 65})
    }
    assert len(salts) == 4 and None not in salts
    request = prefilling(Alone(), 300)
    assert request.block_hashes == [] and request.hashed == ["again"]
    short = prefilling(Alone(), 299, "mine")
    assert (short.cache_salt, short.block_hashes, short.hashed) == ("mine", ["old"], [])


@pytest.mark.parametrize(
    "computed, new, wanted",
    [(0, 1000, 1000), (0, 500, 384), (0, 100, 0), (384, 616, 616), (384, 615, 512), (50, 100, 78), (1000, 1, 1)],
)
def test_chunks_hold_whole_blocks_of_queries(computed: int, new: int, wanted: int) -> None:
    scheduler = Alone()
    request = prefilling(scheduler, 1000)
    request.num_tokens = 1001
    scheduler.num_prefill_lookahead = 1
    assert scheduler._reserve_prefill_lookahead(request, computed, new) == wanted


@pytest.mark.parametrize("most, threshold", [(300, 0), (8192, 100)])
def test_where_there_is_never_room_for_a_block_chunks_end_anywhere(most: int, threshold: int) -> None:
    scheduler = Alone()
    scheduler.max_num_scheduled_tokens = most
    scheduler.scheduler_config.long_prefill_token_threshold = threshold
    request = prefilling(scheduler, 1000)
    request.num_tokens, scheduler.num_prefill_lookahead = 1000, 1
    assert scheduler._reserve_prefill_lookahead(request, 0, 100) == 100


def test_what_a_pattern_computed_is_told() -> None:
    scheduler = Alone()
    request = prefilling(scheduler, 300)
    orders = StepOrders()
    scheduler._start_prefill(orders, "r")
    (start,) = orders.patterns
    assert (start.request_id, start.prompt_len, start.pattern["window"]) == ("r", 300, 64)
    before = scheduler._told(request)["kv_cache"]["prefill_usage"]
    assert before["density"] == {"mean": 1.0} and before["pattern"] == "streaming"
    report = PatternReport("r", "streaming", 250, [0.5, 0.25], 40)
    scheduler.prefill_totals.add(report)
    scheduler.prefills["r"].report = report
    told = scheduler._told(request)["kv_cache"]
    assert told["prefill_usage"]["density"] == {"mean": 0.375, "by_layer": [0.5, 0.25]}
    assert told["prefill_usage"]["tokens"] == 250
    assert told["prefill_totals"] == {"streaming": {"prompts": 1, "tokens": 250, "pairs": 80, "pairs_computed": 30}}


def test_blocks_that_plans_cant_be_made_of_leave_the_prompt_dense() -> None:
    scheduler = Alone()
    scheduler.kv_blocks.block_size = 96
    request = prefilling(scheduler, 400)
    assert not scheduler.prefills["r"].planned and request.block_hashes == ["old"]


@pytest.mark.parametrize(
    "kind, boundary, held, compacted",
    [
        (None, 0, 25, 0),
        ({"policy": "snapkv", "budget": 100}, 0, 19, 0),  # its prompt is still whole
        ({"policy": "snapkv", "budget": 100}, 300, 25, 5 + 25 - 18),  # kept pages, the tail's block and those since
        ({"policy": "streamingllm", "budget": 100, "interval": 64}, 352, 25, 5 + 25 - 22),
    ],
)
def test_statistics_tell_what_holds_the_blocks(
    monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any] | None, boundary: int, held: int, compacted: int
) -> None:
    scheduler = Alone()
    request = scheduler.plan(kind)
    scheduler.running = [request]
    scheduler.compressions["r"].boundary = boundary
    scheduler.kv_blocks.req_to_blocks["r"] = [None] * held
    scheduler.kv_cache_manager.block_pool.get_num_free_blocks = lambda: 900
    monkeypatch.setattr(Scheduler, "make_stats", lambda *_: SimpleNamespace(kv_connector_stats=None))
    told = scheduler.make_stats().kv_connector_stats
    assert told == {POOL: {"compacted": compacted, "dense": 100 - compacted, "free": 900}}
    monkeypatch.setattr(Scheduler, "make_stats", lambda *_: None)  # --disable-log-stats
    assert scheduler.make_stats() is None
