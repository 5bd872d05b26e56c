"""The OpenAI API with a `decode_attention` field, on the real model."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from benchmarks.serving import Server
from tests.e2e.test_api import QUESTION, usage_of

pytestmark = pytest.mark.e2e

WHOLE = {"policy": "none"}


def ask(client: OpenAI, decode_attention: dict[str, Any], kv_cache: dict[str, Any] | None = None) -> Any:
    return client.chat.completions.create(
        model="SmolLM2-135M-Instruct",
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=12,
        extra_body={"kv_cache": kv_cache or WHOLE, "decode_attention": decode_attention},
    )


@pytest.mark.parametrize("words", [
    {"selector": "recycled", "tokens": 512}, {"selector": "quest", "tokens": 512},
    {"selector": "tidal", "tokens": 1024, "kernel": 1},
], ids=lambda words: words["selector"])  # fmt: skip
def test_a_part_of_the_context_finds_the_key(client: OpenAI, words: dict[str, Any]) -> None:
    """2,409 tokens; recycled and quest find it with 256, tidal with 512."""
    answer = ask(client, {"min_context": 0, **words})
    assert "48213" in answer.choices[0].message.content
    usage = answer.usage.model_extra["decode_attention"]
    assert usage.items() >= words.items()
    assert sum(usage["steps"].values()) == answer.usage.completion_tokens - 1
    assert not usage["steps"].keys() & {"dense", "crowded"}
    assert usage_of(answer)["bytes_freed"] == 0


def test_short_contexts_are_read_whole(client: OpenAI) -> None:
    usage = ask(client, {"selector": "quest"}).usage.model_extra["decode_attention"]
    assert usage["steps"].keys() == {"dense"}


def test_with_a_policy_both_are_told(client: OpenAI) -> None:
    answer = ask(client, {"selector": "quest", "tokens": 128, "min_context": 0}, {"policy": "snapkv", "budget": 512})
    assert usage_of(answer)["kept_tokens"]["mean"] <= 512
    assert answer.usage.model_extra["decode_attention"]["steps"].keys() == {"select"}


@pytest.mark.parametrize(
    "words, named",
    [
        ({"selector": "lessismore"}, "--decode-selectors lessismore"),
        ({"selector": "loki"}, "longreach calibrate"),
        ({"selector": "nearest"}, "recycled"),
        ({"selector": "quest", "tokens": 7}, "decode_attention.tokens"),
    ],
)
def test_wrong_words_are_400s(client: OpenAI, words: dict[str, Any], named: str) -> None:
    with pytest.raises(BadRequestError, match=named):
        ask(client, words)


def test_a_selector_that_needs_a_whole_cache_is_refused_with_a_policy(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="kv_cache"):
        ask(client, {"selector": "tidal"}, {"policy": "snapkv", "budget": 512})


def test_metrics_and_the_list_of_selectors(server: Server) -> None:
    metrics = httpx.get(f"{server.url}/metrics").text
    assert 'longreach_decode_steps_total{mode="select",model_name="SmolLM2-135M-Instruct",selector="quest"}' in metrics
    listed = httpx.get(f"{server.url}/v1/decode/selectors").json()
    assert listed["default"] == {"selector": "dense"}
    assert {each["name"] for each in listed["data"] if each.get("enabled")} >= {"recycled", "quest", "tidal"}
