"""The OpenAI API with a `prefill_attention` field, on the real model."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from benchmarks.serving import Server
from tests.e2e.test_api import QUESTION

pytestmark = pytest.mark.e2e


OWN = "Patterns."
"""With it the prompt isn't found in the prefix cache, where other tests of this server left its document."""


def ask(client: OpenAI, words: dict[str, Any], **others: Any) -> Any:
    return client.chat.completions.create(
        model="SmolLM2-135M-Instruct",
        messages=[{"role": "user", "content": f"{OWN} {QUESTION}"}],
        temperature=0,
        max_tokens=12,
        extra_body={"kv_cache": {"policy": "none"}, "prefill_attention": words, **others},
    )


STREAMING = {"pattern": "streaming", "sinks": 64, "window": 128, "min_context": 0}


@pytest.mark.parametrize("words", [
    {"pattern": "xattention", "threshold": 0.9, "min_context": 0},
    {"pattern": "flexprefill", "gamma": 0.95, "min_context": 0},
    {"pattern": "delta", "gamma": 16, "base": STREAMING},
], ids=lambda words: words["pattern"])  # fmt: skip
def test_a_part_of_the_attention_finds_the_key(client: OpenAI, words: dict[str, Any]) -> None:
    answer = ask(client, words)
    assert "48213" in answer.choices[0].message.content
    usage = answer.usage.model_extra["prefill_attention"]
    assert usage["pattern"] == words["pattern"]
    assert usage["tokens"] == answer.usage.prompt_tokens
    assert len(usage["density"]["by_layer"]) == 30 and 0.1 < usage["density"]["mean"] < 0.95


def test_short_prompts_are_attended_whole(client: OpenAI) -> None:
    usage = ask(client, {"pattern": "xattention"}).usage.model_extra["prefill_attention"]
    assert usage["density"] == {"mean": 1.0} and usage["min_context"] == 16384


def test_with_a_policy_and_a_selector_all_are_told_in_a_stream_too(server: Server) -> None:
    body = {
        "model": "SmolLM2-135M-Instruct",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 12,
        "stream": True,
        "stream_options": {"include_usage": True},
        "kv_cache": {"policy": "snapkv", "budget": 512},
        "decode_attention": {"selector": "quest", "tokens": 128, "min_context": 0},
        "prefill_attention": {"pattern": "xattention", "threshold": 0.9, "min_context": 0},
    }
    lines = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=600).text.splitlines()
    usages = [json.loads(line[5:])["usage"] for line in lines if line.startswith("data:") and '"usage"' in line]
    usage = next(usage for usage in reversed(usages) if usage)
    assert usage["kv_cache"]["kept_tokens"]["mean"] <= 512
    assert usage["decode_attention"]["steps"].keys() == {"select"}
    assert usage["prefill_attention"]["density"]["mean"] < 0.95


@pytest.mark.parametrize(
    "words, named",
    [
        ({"pattern": "nearest"}, "xattention"),
        ({"pattern": "xattention", "threshold": 2}, "prefill_attention.threshold"),
        ({"pattern": "delta", "base": {"pattern": "streaming", "window": 0}}, "prefill_attention.base.window"),
    ],
)
def test_wrong_words_are_400s(client: OpenAI, words: dict[str, Any], named: str) -> None:
    with pytest.raises(BadRequestError, match=named):
        ask(client, words)


def test_the_list_of_patterns_and_metrics(client: OpenAI, server: Server) -> None:
    ask(client, {**STREAMING, "window": 100})
    listed = httpx.get(f"{server.url}/v1/prefill/patterns").json()
    assert listed["default"] == {"pattern": "dense"} and listed["available"]
    (model,) = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert model["prefill_attention"] == {"pattern": "dense"}
    metrics = httpx.get(f"{server.url}/metrics").text
    labels = '{model_name="SmolLM2-135M-Instruct",pattern="streaming"}'
    values = {name: float(metrics.split(f"longreach_prefill_{name}_total{labels} ")[1].split()[0])
              for name in ("prompts", "tokens", "pairs", "pairs_computed")}  # fmt: skip
    assert values["prompts"] >= 1 and 0 < values["pairs_computed"] < values["pairs"]
