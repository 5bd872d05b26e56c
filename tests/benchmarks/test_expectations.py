"""The passkey benchmark's policies, expectations, kept window and summary table."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.quality.expect import (
    failures,
    kept_ranges,
    parse_expectation,
    parse_policy,
    visibility,
    window_mismatches,
)
from benchmarks.quality.report import Row, summarise, table

# Policies and expectations


def test_policies_become_request_fields() -> None:
    assert parse_policy("none").body == {"kv_cache": {"policy": "none"}}
    assert parse_policy("plain").body == {}
    policy = parse_policy("snapkv:512,window=64,pool=max,ratio=0.5,strict=true")
    assert policy.body["kv_cache"] == {
        "policy": "snapkv",
        "budget": 512,
        "window": 64,
        "pool": "max",
        "ratio": 0.5,
        "strict": True,
    }
    assert policy.label == "snapkv:512,window=64,pool=max,ratio=0.5,strict=true"


@pytest.mark.parametrize("text", ["", ":512", "snapkv:", "snapkv:x", "snapkv,window", "snapkv,budget=3", "plain:5"])
def test_wrong_policies_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_policy(text)


POLICIES = [parse_policy(text) for text in ("none", "snapkv:512,window=8", "random:512", "streamingllm:512")]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("none>=31", ("none", ">=", "31")),
        ("snapkv:512,window=8>=30", ("snapkv:512,window=8", ">=", "30")),
        ("random:512<snapkv:512,window=8", ("random:512", "<", "snapkv:512,window=8")),
        ("streamingllm==window", ("streamingllm", "==", "window")),
        ("random == 0", ("random", "==", "0")),
    ],
)
def test_expectations_are_read(text: str, parts: tuple[str, str, str]) -> None:
    expectation = parse_expectation(text, POLICIES)
    assert (expectation.left, expectation.op, expectation.right) == parts


@pytest.mark.parametrize(
    "text", ["none", "none>=", ">=3", "none=3", "h2o>=3", "none>=h2o", "random>=window", "none==window", "none>=3>=4"]
)
def test_expectations_that_could_not_be_checked_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_expectation(text, POLICIES)


def test_failed_expectations_are_named() -> None:
    found = {
        "none": {0: True, 1: True},
        "snapkv:512,window=8": {0: True, 1: False},
        "random:512": {0: True, 1: False},
        "streamingllm:512": {0: False, 1: True},
    }
    texts = ["none>=2", "none<=1", "random:512<snapkv", "snapkv==1", "streamingllm==window"]
    expectations = [parse_expectation(text, POLICIES) for text in texts]
    spans, lengths = {0: (100, 120), 1: (3900, 3920)}, {0: 4000, 1: 4000}
    wrong = failures(expectations, POLICIES, found, spans, lengths, 32)
    assert wrong == ["none<=1: none found 2", "random:512<snapkv: random:512 found 1, snapkv:512,window=8 found 1"]
    found["streamingllm:512"] = {0: True, 1: True}
    (line,) = failures(expectations[-1:], POLICIES, found, spans, lengths, 32)
    assert "streamingllm==window" in line and "document 0" in line and "outside" in line


# What StreamingLLM keeps


@pytest.mark.parametrize(
    ("prompt", "budget", "page", "ranges"),
    [
        (6000, 512, 32, [(0, 4), (6000 - 16 - 476, 6000)]),  # tail 16, 15 pages = 480 slots
        (6016, 512, 32, [(0, 4), (6016 - 508, 6016)]),  # no tail, 16 pages
        (6015, 512, 32, [(0, 4), (5984 - 476, 6015)]),  # tail 31, 15 pages
        (6000, 20, 32, [(5984, 6000)]),  # only the tail
        (6000, 10, 32, [(5984, 6000)]),  # the tail stays even beyond the budget
        (500, 512, 32, [(0, 500)]),
        (512, 512, 32, [(0, 512)]),
        (513, 512, 32, [(0, 4), (512 - 476, 513)]),
    ],
)
def test_kept_window(prompt: int, budget: int, page: int, ranges: list[tuple[int, int]]) -> None:
    assert kept_ranges(prompt, budget, page) == ranges
    if ranges[-1][1] - ranges[-1][0] < prompt and budget >= page + prompt % page:
        assert budget - page < sum(end - start for start, end in ranges) <= budget


def test_visibility_of_a_span() -> None:
    ranges = [(0, 4), (100, 200)]
    assert [visibility(span, ranges) for span in [(100, 200), (4, 100), (90, 101), (0, 5), (0, 4), (199, 201)]] == [
        *("inside", "outside", "partly", "partly", "inside", "partly")
    ]


def test_partly_visible_keys_say_nothing() -> None:
    policy = parse_policy("streamingllm:512,sinks=8")
    start = kept_ranges(6000, 512, 32, 8)[1][0]
    assert start == 5984 - 472
    spans = {0: (start, start + 20), 1: (start - 1, start + 20), 2: (start - 30, start), 3: (2, 9)}
    lengths = dict.fromkeys(spans, 6000)
    for partly in (True, False):
        found = {0: True, 1: partly, 2: False, 3: partly}
        assert window_mismatches(policy, found, spans, lengths, 32) == []
    wrong = window_mismatches(policy, {0: False, 1: True, 2: True, 3: True}, spans, lengths, 32)
    assert [line.split(":")[0] for line in wrong] == ["document 0", "document 2"]


# Report


def test_summary_table() -> None:
    def row(document: int, found: bool, seconds: float, cache: dict[str, Any] | None) -> Row:
        return Row(
            "snapkv:512", document, 0.5, 0, "12345", found, "", seconds, 6000, prompt_tokens=6000, kv_cache=cache
        )

    kept = {"kept_tokens": {"mean": 500.0, "min": 400, "max": 600}, "bytes_held": 2**20, "bytes_freed": 3 * 2**20}
    rows = [row(0, True, 1.0, kept), row(1, False, 9.0, kept), row(2, True, 2.0, None)]
    summary = summarise(parse_policy("snapkv:512"), rows)
    assert (summary.found, summary.total, summary.kept_tokens, summary.seconds_median) == (2, 3, 500.0, 2.0)
    assert summary.kept_fraction == pytest.approx(500 / 6000)
    text = table([summary, summarise(parse_policy("none"), [row(0, True, 1.0, None)])])
    head, rule, first, second = (line.split("|")[1:-1] for line in text.splitlines())
    assert len({len(line) for line in text.splitlines()}) == 1 and set("".join(rule)) <= set("-:")
    assert [cell.strip() for cell in head][:4] == ["policy", "budget", "found", "kept tokens"]
    cells = [cell.strip() for cell in first]
    assert cells == ["snapkv:512", "512", "2/3", "500.0", "8.3%", "1.00 MiB", "3.00 MiB", "2.00", "0"]
    assert [cell.strip() for cell in second][:5] == ["none", "-", "1/1", "-", "-"]
