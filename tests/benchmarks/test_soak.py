"""The soak's own parts: what it asks for, how it judges answers, memory and canaries."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from benchmarks.soak.clients import Clients, Found, _difference
from benchmarks.soak.mix import OURS, POLICIES, Ask, Features, Mix, canaries
from benchmarks.soak.processes import parts, resident, slope, tree
from benchmarks.soak.report import problems, summary
from benchmarks.soak.run import Series
from kvcache.registry import make_policy

FEATURES = Features("m", 900, 60, 5000, adapters=("soak-1",), selectors=("quest", "tidal"), priorities=True,
                    policies=tuple(words["policy"] for words in POLICIES))  # fmt: skip


def test_the_mix_has_everything_and_is_always_the_same() -> None:
    mixes = [Mix(FEATURES, 3) for _ in range(2)]
    asks = [mixes[0].draw() for _ in range(2000)]
    assert [mixes[1].draw() for _ in range(2000)] == asks
    assert {ask.kind for ask in asks} == {"refused", "structured", "completion", "stream", "cut stream", "aborted"}
    tags = {tag for ask in asks for tag in ask.tags}
    assert {"n", "logprobs", "prompt logprobs", "adapter", "stop", "salt", "selector tidal", "pattern delta"} <= tags
    assert {f"policy {words['policy']}" for words in POLICIES if not words.get("interval")} <= tags
    for ask in asks:
        prompt = ask.body.get("prompt", [])
        assert ask.refused or (len(prompt) <= 900 and all(100 <= token < 5000 for token in prompt))
        assert not ("selector tidal" in ask.tags and ask.body["kv_cache"]["policy"] != "none")
        assert not ("prompt_logprobs" in ask.body and "stream" in ask.body)  # a 400
        assert ("prompt logprobs" in ask.tags) == ("prompt_logprobs" in ask.body)


def test_stock_vllm_is_asked_for_nothing_of_ours() -> None:
    features = Features("m", 900, 60, 5000, patterns=False, priorities=True, prompt_logprobs=False, stock=True)
    mix = Mix(features, 3)
    asks = [mix.draw() for _ in range(1000)]
    assert {ask.kind for ask in asks} == {"refused", "structured", "completion", "stream", "cut stream", "aborted"}
    for body in [*(ask.body for ask in asks), *canaries(features).values()]:
        assert not body.keys() & {*OURS, "seed", "prompt_logprobs"}
    # Without what makes it a 400 a refused request would be none.
    assert all(ask.body["temperature"] < 0 or len(ask.body["prompt"]) > 900 for ask in asks if ask.refused)


def test_a_budget_is_what_the_plan_keeps_at_most() -> None:
    mix = Mix(FEATURES, 5)
    seen = 0
    for ask in (mix.draw() for _ in range(600)):
        if ask.budget is None or (policy := make_policy(ask.body["kv_cache"])) is None:
            continue
        if not (plan := policy.plan(len(ask.body["prompt"]), 16)):
            continue
        seen += 1
        assert plan.kept_tokens + len(ask.body["prompt"]) - plan.prompt_len <= ask.budget
    assert seen > 50


def answered(reply: Callable[[dict[str, Any]], httpx.Response], ask: Ask, **more: Any) -> Found:
    """What a client finds of an answer."""
    found = Found(**more)

    async def run() -> None:
        clients = Clients("http://server", found, lambda: True)
        respond = httpx.MockTransport(lambda request: reply(json.loads(request.content)))
        clients.http = httpx.AsyncClient(base_url="http://server", transport=respond)
        await clients._one(ask)

    asyncio.run(run())
    return found


def ask(**body: Any) -> Ask:
    words = {"policy": "snapkv", "budget": 256}
    return Ask("completion", "/v1/completions", {"max_tokens": 5, "ignore_eos": True, "kv_cache": words, **body},
               budget=256)  # fmt: skip


def whole(tokens: int = 5, kept: float = 250, policy: str = "snapkv", answers: int = 1, status: int = 200) -> Any:
    told = {"policy": policy, "kept_tokens": {"mean": kept}, "bytes_freed": 1}
    body = {"usage": {"completion_tokens": tokens, "kv_cache": told}, "choices": [{"text": "a"}] * answers}
    return lambda request: httpx.Response(status, json=body)


def test_answers_as_asked_for_pass() -> None:
    found = answered(whole(), ask())
    assert not found.failures and found.kept == 1 and found.answers == {"200": 1}


@pytest.mark.parametrize("reply, message", [
    (whole(tokens=4), "4 tokens, 5 wanted"), (whole(tokens=6), "6 tokens, 5 wanted"), (whole(kept=257), "is 256"),
    (whole(policy="none"), "told {'policy': 'none'"), (whole(answers=2), "2 answers to"), (whole(status=500), ": 500 "),
])  # fmt: skip
def test_answers_that_are_not_are_told(reply: Any, message: str) -> None:
    lines: list[str] = []
    (failure,) = answered(reply, ask(), say=lines.append).failures
    assert message in failure and lines == [f"FAILURE: {failure}"]


def test_streams_are_cut_or_read_to_the_end() -> None:
    usage = {"usage": {"completion_tokens": 5, "kv_cache": {"policy": "snapkv"}}, "choices": []}
    lines = [{"choices": [{"text": "a"}]}] * 5
    text = "".join(f"data: {json.dumps(line)}\n\n" for line in [*lines, usage]) + "data: [DONE]\n\n"
    found = answered(lambda request: httpx.Response(200, text=text), ask(stream=True))
    assert not found.failures and found.tokens == 5
    cut = ask(stream=True)
    cut.cut_after = 2
    found = answered(lambda request: httpx.Response(200, text=text), cut)
    assert found.answers == {"200": 1, "left": 1} and not found.tokens
    broken = 'data: {"error": {"message": "gone"}}\n\n'
    found = answered(lambda request: httpx.Response(200, text=broken), ask(stream=True))
    assert "gone" in found.failures[0] and "without usage" in found.failures[1]


def test_canaries_differ_by_noise_or_by_more() -> None:
    assert {"whole", "compacted", "compacted again", "selected", "pattern", "adapter"} == set(canaries(FEATURES))
    first = [{"a": -0.1, "b": -2.0}, {"c": -0.5, "d": -0.51}]
    other = [{"a": -0.1001, "b": -2.0}, {"c": -0.5, "d": -0.4999}]
    assert _difference([1, 2], first, [1, 3], other) == {"token": 1, "margin": 0.01, "noise": 0.0101}
    found = Found(canaries={"whole": {"asked": 3, "same": 2}, "adapter": {"asked": 4, "same": 4}})
    assert found.same_canaries() == "6 of 7 canaries the same"


def result(**change: Any) -> dict[str, Any]:
    told = {"flat": True, "grown_mib": 1.0, "bound_mib": 24.0, "mib_per_hour": 4.0}
    return {
        "failures": [], "memory": {"API": told}, "seconds": 60, "asked": {"stream": 3}, "server": {"audits": 9},
        "canaries": {"whole": {"asked": 2, "same": 2, "different": []}}, "pool": {"peak": 0.5, "leaked": 0.0}, **change,
    }  # fmt: skip


def test_what_is_wrong_is_told() -> None:
    grown = {"API": {"flat": False, "grown_mib": 90.0, "bound_mib": 24.0, "mib_per_hour": 400.0}}
    tie = {"whole": {"asked": 2, "same": 1, "different": [{"token": 1, "margin": 0.01, "noise": 0.01}]}}
    other = {"whole": {"asked": 2, "same": 1, "different": [{"token": 1, "margin": 0.01, "noise": 0.2}]}}
    cases: list[tuple[dict[str, Any], dict[str, bool], int]] = [
        (result(), {"memory": True, "canaries": True}, 0),
        (result(failures=["x"]), {"memory": False, "canaries": False}, 1),
        (result(memory=grown), {"memory": True, "canaries": True}, 1),
        (result(memory=grown), {"memory": False, "canaries": True}, 0),
        (result(canaries=tie), {"memory": True, "canaries": True}, 1),
        (result(canaries=tie), {"memory": True, "canaries": False}, 0),
        (result(canaries=other), {"memory": True, "canaries": False}, 1),
    ]  # fmt: skip
    for found, judged, number in cases:
        bad = problems(found, **judged)
        assert len(bad) == number, (bad, judged)
        assert summary(found, bad).startswith("FAILED" if number else "ok: 1.0 min, 3 requests")


def test_memory_is_that_of_the_servers_processes() -> None:
    # The child says when it has started: only then its memory stays as it is.
    script = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'print(flush=True); input()'], " \
        "stdin=-1, stdout=-1); p.stdout.readline(); print(p.pid, flush=True); input()"  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        found = tree(parent.pid)
        assert found["API"] == parent.pid and child in found.values() and os.getpid() not in found.values()
        assert 1 < (resident(child) or 0) < 500
        assert sum(parts(child).values()) == pytest.approx(resident(child), abs=1)
        assert all(size > 0.1 for size in parts(child).values())
        parent.communicate("\n")
    assert resident(parent.pid) is None and parts(parent.pid) == {}


@pytest.mark.parametrize("by_hour, flat", [(0.0, True), (40.0, True), (2000.0, False)])
def test_growth_is_that_of_the_second_half(by_hour: float, flat: bool) -> None:
    seconds = [float(second) for second in range(0, 1801, 10)]
    values = [500 + (300 if second < 600 else 0) + by_hour * second / 3600 for second in seconds]
    told = Series(seconds=seconds, memory={"API": values}).memory_told()["API"]
    assert told["mib_per_hour"] == pytest.approx(by_hour, abs=0.1) and told["flat"] is flat
    assert slope([1.0], [2.0]) == 0
