"""Loads on a fake endpoint: bounded, the same for all, and honest about what became of each request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest

from benchmarks.evaluation.endpoint import Endpoint
from benchmarks.loadtest.generator import Limits, Load
from benchmarks.loadtest.profiles import parse
from benchmarks.loadtest.prompts import Writer
from benchmarks.loadtest.records import DONE, FAILED, NOT_SENT, UNFINISHED, Goals, Record
from tests.benchmarks.loadtest.fake import Fake

FAR = Limits(seconds=60, drain=60, concurrency=100)


def load(
    fake: Fake, text: str, starts: Sequence[float], requests: int = 0, limits: Limits = FAR,
    fields: Mapping[str, Any] | None = None, goals: Goals | None = None,
) -> tuple[list[Record], Load]:  # fmt: skip
    async def run() -> tuple[list[Record], Load]:
        endpoint = Endpoint(fake.url)
        conversations = parse(text).conversations(requests or len(starts), 0)
        one = Load(endpoint, Writer(), conversations, starts, fields or {}, limits)
        try:
            return await one.run(), one
        finally:
            await endpoint.close()

    return asyncio.run(run())


def test_requests_are_sent_as_they_are_and_timed(fake: Fake) -> None:
    fake.first, fake.step = 0.1, 0.02
    fields = {"kv_cache": {"policy": "snapkv", "budget": 512}, "cache_salt": "a"}
    found, one = load(fake, "prompts,prompt=50,output=5", [0.0, 0.1], fields=fields)
    assert [record.status for record in found] == [DONE, DONE]
    expected = [Writer().ids(conversation.turns[0]) for conversation in parse("prompts,prompt=50").conversations(2, 0)]
    assert [body["prompt"] for body in fake.bodies] == expected
    for body in fake.bodies:
        assert fields.items() <= body.items()
        assert body["max_tokens"] == 5 and body["ignore_eos"] and body["temperature"] == 0
    for record in found:
        assert record.ttft is not None and record.tpot is not None and record.seconds is not None
        assert record.ttft >= 0.1 and record.seconds >= 0.18  # a busy client may see the first token late
        assert record.tpot == pytest.approx((record.seconds - record.ttft) / 4)
        assert (record.prompt_tokens, record.output_tokens) == (50, 5)
    told = one.metrics(Goals(ttft=60, tpot=60))
    assert told["completed"] == 2 and told["total_output"] == 10 and told["request_goodput"] > 0
    assert set(told["percentiles_ttft_ms"]) == {"p50", "p90", "p95", "p99"}
    assert one.metrics(Goals(ttft=0.05, tpot=60))["request_goodput"] == 0


def test_all_that_are_compared_get_the_same_requests_at_the_same_times(fake: Fake) -> None:
    starts = [0.0, 0.05, 0.3]
    both = []
    for fields in ({}, {"kv_cache": {"policy": "snapkv"}}):
        fake.bodies.clear()
        found, _ = load(fake, "mixed,short=20,long=90,share=0.5,output=2", starts, fields=fields)
        both.append([body["prompt"] for body in fake.bodies])
        for record, start in zip(found, starts, strict=True):
            assert record.arrival >= start  # never early; how late is the machine's
    assert both[0] == both[1] and len({len(prompt) for prompt in both[0]}) == 2


def test_an_overloaded_server_ends_in_time_and_is_told_of(fake: Fake) -> None:
    fake.first, fake.step, fake.places = 0.05, 60.0, 1
    began = time.monotonic()
    found, one = load(fake, "prompts,prompt=50,output=5", [0.0, 0.0, 0.1, 50.0], limits=Limits(0.5, 0.5, 100))
    assert time.monotonic() - began < 20
    assert [record.status for record in found] == [UNFINISHED, UNFINISHED, UNFINISHED, NOT_SENT]
    # One has begun its answer, and that is known though it was never finished.
    assert sorted(record.ttft is not None for record in found) == [False, False, False, True]
    assert one.metrics(Goals()) == {} and one.duration < 10
    end = time.monotonic() + 10
    while fake.running and time.monotonic() < end:
        time.sleep(0.05)
    assert fake.running == 0 and fake.cut == 3  # nothing goes on there


def test_no_more_are_in_flight_than_allowed_and_waiting_counts(fake: Fake) -> None:
    fake.first = 0.2
    found, one = load(fake, "prompts,prompt=50,output=1", [0.0] * 5, limits=Limits(60, 60, 2))
    assert fake.most_running == one.most_in_flight == 2
    waits = sorted(record.ttft or 0.0 for record in found)
    assert waits[-1] >= 0.6  # two rounds before it
    assert one.metrics(Goals(ttft=0.5))["request_goodput"] < one.metrics(Goals(ttft=60))["request_goodput"]


def test_a_conversation_waits_for_its_answers(fake: Fake) -> None:
    fake.first = 0.05
    text = "agent,start=10,step=10,longest_prompt=30,output=2,pause=0.1"
    found, _ = load(fake, text, [0.0], requests=3)
    assert fake.log == [("begin", 10), ("end", 10), ("begin", 20), ("end", 20), ("begin", 30), ("end", 30)]
    times = [(record.arrival, record.seconds or 0.0) for record in found]
    for (before, took), (after, _) in pairwise(times):
        assert after >= before + took + 0.1


def test_a_conversation_ends_with_a_turn_that_isnt_answered(fake: Fake) -> None:
    fake.stops_after = 1
    found, _ = load(fake, "agent,start=10,step=10,longest_prompt=30,output=2", [0.0], requests=3)
    assert [record.status for record in found] == [FAILED, NOT_SENT, NOT_SENT]
    assert found[0].error == "2 tokens were asked for, 1 came"


def test_what_an_error_says_is_kept(fake: Fake) -> None:
    found, one = load(fake, "prompts,prompt=50,output=5", [0.0], fields={"kv_cache": {"policy": "unknown"}})
    assert found[0].status == FAILED and "status 400" in str(found[0].error)
    assert "there is no 'unknown'" in str(found[0].error)
    assert one.metrics(Goals()) == {}


@pytest.mark.parametrize(("ttft", "tpot", "good"), [(1.0, 0.1, True), (0.4, 0.1, False), (1.0, 0.01, False)])
def test_good_requests_keep_both_goals(ttft: float, tpot: float, good: bool) -> None:
    record = Record(0, 0, 10, 10, 0.0, status=DONE, ttft=0.5, tpot=0.05)
    assert record.good(Goals(ttft, tpot)) is good
    record.status = UNFINISHED
    assert not record.good(Goals(ttft, tpot))
