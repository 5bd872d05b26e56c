"""What a request and a server are told of compactions: of prompts, suffixes and answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kvcache.orders import CompactionReport
from kvcache.plan import RetentionPlan
from kvcache.usage import TOTALS, CompressionTotals, kv_cache_usage
from tests.kvcache.answers import grown
from tests.kvcache.synthetic import PAGE, PagedCache, words

BLOCK = 1000
"""Bytes of a block."""
REPORT = CompactionReport("r", 150, [70.0, 54.0, 62.0], 150.0, 5, 0, 0.25)
PLAN = RetentionPlan(150, PAGE, 4, pinned=4, interval=32)


def usage(prompt_len: int, plan: RetentionPlan | None, report: CompactionReport | None, **told: Any) -> dict[str, Any]:
    return kv_cache_usage({"policy": "x", **told}, prompt_len, plan, report, BLOCK, PAGE)


def test_a_prompt_that_was_compacted() -> None:
    assert usage(150, PLAN, REPORT, budget=70) == {
        "policy": "x",
        "budget": 70,
        "prompt_tokens": 150,
        "kept_tokens": {"mean": 62.0, "min": 54.0, "max": 70.0},
        "bytes_held": 5 * BLOCK,  # four pages and the tail's, of ten
        "bytes_freed": 5 * BLOCK,
    }


@pytest.mark.parametrize("plan", [None, PLAN, RetentionPlan(288, PAGE, 4, interval=32)])
def test_nothing_was_compacted(plan: RetentionPlan | None) -> None:
    """No plan; a plan whose prompt's first token is the answer's last; an answer that has not grown so far."""
    told = usage(150, plan, None)
    assert told["kept_tokens"] == {"mean": 150.0, "min": 150.0, "max": 150.0}
    assert (told["bytes_held"], told["bytes_freed"]) == (10 * BLOCK, 0)
    assert "compacted_tokens" not in told


@pytest.mark.parametrize("suffix", [1, 10, 21, 200])
def test_a_suffix_counts_as_kept(suffix: int) -> None:
    prompt_len = 150 + suffix
    told = usage(prompt_len, replace(PLAN, interval=0), REPORT)
    assert told["kept_tokens"] == {"mean": 62.0 + suffix, "min": 54.0 + suffix, "max": 70.0 + suffix}
    assert told["prompt_tokens"] == prompt_len and "compacted_tokens" not in told
    assert (told["bytes_freed"], told["bytes_held"]) == (5 * BLOCK, (-(-prompt_len // PAGE) - 5) * BLOCK)


@pytest.mark.parametrize("boundary", [176, 208, 240])
def test_an_answer_that_was_compacted_takes_the_prompts_place(boundary: int) -> None:
    report = CompactionReport("r", boundary, [80.0, 48.0], 96.0, 2, 0, 0.1)
    told = usage(150, PLAN, report)
    assert (told["prompt_tokens"], told["compacted_tokens"]) == (150, boundary)
    assert told["kept_tokens"] == {"mean": 64.0, "min": 48.0, "max": 80.0}
    assert (told["bytes_held"], told["bytes_freed"]) == (4 * BLOCK, (boundary // PAGE - 4) * BLOCK)


def test_a_long_suffix_that_was_compacted_in_part() -> None:
    """The last compaction came before the prompt's end: what is behind it counts as kept."""
    report = CompactionReport("r", 208, [64.0], 96.0, 2, 0, 0.1)
    told = usage(230, PLAN, report)
    assert "compacted_tokens" not in told
    assert told["kept_tokens"]["mean"] == 64 + 22
    assert (told["bytes_held"], told["bytes_freed"]) == ((15 - 9) * BLOCK, 9 * BLOCK)


def test_tables_are_not_told() -> None:
    assert "gates" not in usage(10, None, None, gates=[[0.5]], sinks=4) and usage(10, None, None, sinks=4)["sinks"] == 4


@pytest.mark.parametrize("prompt_len", [50, 150, 160])
@pytest.mark.parametrize(
    "order",
    [
        words("streamingllm", 70, interval=32),
        words("snapkv", 70, interval=32, layers="pyramid"),
        words("keydiff", 70, suffix=20),
        words("tova", 70, interval=32, suffix=20),
        words("raas", 40, interval=16),
    ],
    ids=lambda order: f"{order['policy']}",
)
def test_usage_is_what_is_held(order: dict[str, Any], prompt_len: int) -> None:
    """Against the blocks that a request has: at each compaction those up to it, or up to the prompt's end."""
    if prompt_len == 50 and not order["interval"]:
        pytest.skip("there is nothing to compact")
    request = grown(PagedCache(prompt_len, new=310 - prompt_len), order, 310)
    totals = CompressionTotals()
    freed = 0
    for number, compaction in enumerate(request.done):
        totals.add(order["policy"], compaction.report)
        told = kv_cache_usage(order, prompt_len, request.plan, compaction.report, BLOCK, PAGE)
        seen = max(prompt_len, compaction.boundary)
        behind = range(compaction.boundary // PAGE, -(-seen // PAGE))
        assert told["bytes_held"] == (request.plan.kept_pages + len(behind)) * BLOCK
        assert told["bytes_held"] + told["bytes_freed"] == -(-seen // PAGE) * BLOCK
        tail = compaction.boundary % PAGE + seen - compaction.boundary
        each = [sum(row) / len(row) * PAGE + tail for row in compaction.counts]
        assert told["kept_tokens"] == {
            "mean": pytest.approx(sum(each) / len(each)), "min": min(each), "max": max(each)
        }  # fmt: skip
        assert told.get("compacted_tokens", prompt_len) == seen
        freed += compaction.report.blocks_freed
        assert freed == told["bytes_freed"] / BLOCK, "blocks freed by all compactions are those that are gone"
        assert totals.by_policy[order["policy"]]["compactions"] == number + 1
    assert totals.by_policy[order["policy"]]["blocks_freed"] == freed


def test_totals_are_sums_by_policy() -> None:
    totals = CompressionTotals()
    second = CompactionReport("r", 176, [64.0, 60.0], 90.0, 2, 3, 0.5)
    for policy, report in (("lra", REPORT), ("lfa", REPORT), ("lra", second), ("lra", replace(second, boundary=208))):
        totals.add(policy, report)
    assert set(totals.by_policy) == {"lra", "lfa"} and list(totals.by_policy["lra"]) == list(TOTALS)
    assert totals.by_policy["lra"] == {
        "compactions": 3,
        "tokens_seen": 150 + 90 + 90,
        "tokens_kept": 62 + 62 + 62,
        "blocks_freed": 5 + 2 + 2,
        "nan_scores": 6,
        "seconds": 1.25,
    }
    assert totals.by_policy["lfa"]["compactions"] == 1 and CompressionTotals().by_policy == {}
