"""The OpenAI API with a `kv_cache` field, through the official client."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from benchmarks.serving import Server

pytestmark = pytest.mark.e2e

DOCUMENT = " ".join(f"Shelf {i} holds {(i * 37) % 101} books about gardens." for i in range(130))
QUESTION = f"{DOCUMENT} The pass key is 48213. Remember it. {DOCUMENT[:2000]}\nWhat is the pass key?"
TOKENS = 12


def ask(client: OpenAI, kv_cache: Any = None, text: str = QUESTION, **more: Any) -> Any:
    return client.chat.completions.create(
        model="SmolLM2-135M-Instruct",
        messages=[{"role": "user", "content": text}],
        temperature=0,
        max_tokens=more.pop("max_tokens", TOKENS),
        extra_body={"kv_cache": kv_cache} if kv_cache is not None else None,
        **more,
    )


def usage_of(answer: Any) -> dict[str, Any]:
    return dict(answer.usage.model_extra["kv_cache"])


def test_model_and_default_policy_are_listed(client: OpenAI) -> None:
    model = client.models.list().data[0]
    assert model.id == "SmolLM2-135M-Instruct"
    assert model.model_extra["kv_cache"]["policy"] == "snapkv"
    assert model.model_extra["kv_cache"]["budget"] == 512


def test_the_default_policy_compresses_and_none_turns_it_off(client: OpenAI) -> None:
    by_default, dense = ask(client), ask(client, {"policy": "none"})
    kept, full = usage_of(by_default), usage_of(dense)
    assert (kept["policy"], kept["budget"]) == ("snapkv", 512)
    assert kept["prompt_tokens"] == full["prompt_tokens"] == by_default.usage.prompt_tokens > 1500
    assert 480 < kept["kept_tokens"]["mean"] <= 512
    assert kept["bytes_held"] + kept["bytes_freed"] == full["bytes_held"]
    assert full["policy"] == "none"
    assert full["kept_tokens"]["mean"] == full["prompt_tokens"]
    assert full["bytes_freed"] == 0
    assert "48213" in dense.choices[0].message.content
    assert "48213" in by_default.choices[0].message.content


def test_layers_differ_with_pyramidkv(client: OpenAI) -> None:
    kept = usage_of(ask(client, {"policy": "pyramidkv", "budget": 512, "window": 32}))["kept_tokens"]
    assert kept["min"] < kept["mean"] < kept["max"]
    assert kept["mean"] == usage_of(ask(client))["kept_tokens"]["mean"]


def test_moments_of_the_queries_compress(client: OpenAI) -> None:
    """Its workers said at the start that they can rotate queries back."""
    usage = usage_of(ask(client, {"policy": "expectedattention", "budget": 300}))
    assert 268 < usage["kept_tokens"]["mean"] <= 300 and usage["weighting"] == "values"


def test_a_ratio_is_a_share_of_the_prompt(client: OpenAI) -> None:
    usage = usage_of(ask(client, {"policy": "streamingllm", "budget": "25%"}))
    share = usage["kept_tokens"]["mean"] / usage["prompt_tokens"]
    assert 0.23 < share <= 0.2505


def test_streaming_carries_usage_in_its_last_chunk(client: OpenAI) -> None:
    chunks = list(ask(client, {"policy": "snapkv", "budget": 400}, stream=True, stream_options={"include_usage": True}))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    usage = usage_of(chunks[-1])
    assert usage["budget"] == 400
    assert 368 < usage["kept_tokens"]["mean"] <= 400
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == ask(client, {"policy": "snapkv", "budget": 400}).choices[0].message.content


def test_completions_with_several_prompts_add_up(client: OpenAI) -> None:
    answer = client.completions.create(
        model="SmolLM2-135M-Instruct",
        prompt=[QUESTION, QUESTION + " Say it."],
        max_tokens=4,
        temperature=0,
        extra_body={"kv_cache": {"policy": "l2norm", "budget": 300}},
    )
    assert len(answer.choices) == 2
    assert usage_of(answer)["prompt_tokens"] == answer.usage.prompt_tokens


def test_responses_api_plain_and_streaming(client: OpenAI) -> None:
    def create(**more: Any) -> Any:
        return client.responses.create(
            model="SmolLM2-135M-Instruct",
            input=QUESTION,
            max_output_tokens=TOKENS,
            temperature=0,
            extra_body={"kv_cache": {"policy": "snapkv", "budget": 400}},
            **more,
        )

    plain = create()
    assert usage_of(plain)["budget"] == 400
    (completed,) = [event.response for event in create(stream=True) if event.type == "response.completed"]
    assert usage_of(completed)["bytes_freed"] == usage_of(plain)["bytes_freed"] > 0
    assert completed.output_text == plain.output_text


def test_structured_output_over_a_compressed_prompt(client: OpenAI) -> None:
    schema = {"type": "object", "properties": {"key": {"type": "integer"}}, "required": ["key"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "key", "schema": schema, "strict": True}}
    answer = ask(client, {"policy": "snapkv", "budget": 400}, response_format=form, max_tokens=40, logprobs=True)
    assert isinstance(json.loads(answer.choices[0].message.content)["key"], int)
    assert answer.choices[0].logprobs.content
    assert usage_of(answer)["bytes_freed"] > 0


def test_tool_calls_work_over_a_compressed_prompt(client: OpenAI) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "open_door",
            "strict": True,
            "parameters": {"type": "object", "properties": {"key": {"type": "integer"}}, "required": ["key"]},
        },
    }
    answer = ask(
        client,
        {"policy": "snapkv", "budget": 512},
        max_tokens=80,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "open_door"}},
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(json.loads(call.function.arguments)["key"], int)
    assert usage_of(answer)["bytes_freed"] > 0


@pytest.mark.parametrize(
    ("kv_cache", "field", "allowed"),
    [
        ({"policy": "nope"}, "kv_cache.policy", "pyramidkv"),
        ({"budget": 512}, "kv_cache.policy", "snapkv"),
        ({"policy": "snapkv", "budget": "many"}, "kv_cache.budget", "25%"),
        ({"policy": "snapkv", "budget": 40}, "kv_cache.budget", ">= 100"),
        ({"policy": "snapkv", "window": "32"}, "kv_cache.window", ">= 1"),
        ({"policy": "snapkv", "kernel": 4}, "kv_cache.kernel", "<= 127"),
        ({"policy": "streamingllm", "window": 32}, "kv_cache.window", "sinks"),
        ({"policy": "namm"}, "kv_cache.policy", "(--kv-namm-weights FILE)"),
        ("snapkv", "kv_cache", "policy"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_name_the_field_and_what_is_allowed(
    client: OpenAI, kv_cache: Any, field: str, allowed: str, stream: bool
) -> None:
    with pytest.raises(BadRequestError) as caught:
        ask(client, kv_cache, "Hi", stream=stream)
    error: Any = caught.value.body
    assert error["param"] == field
    assert allowed in error["message"]
    assert error["code"] == 400


def test_policies_are_described_as_json_schema(server: Server) -> None:
    answer = json.loads(server.get("/v1/kv/policies"))
    by_name = {policy["name"]: policy for policy in answer["data"]}
    assert {"none", "streamingllm", "l2norm", "snapkv", "pyramidkv", "random"} <= set(by_name)
    window = by_name["snapkv"]["arguments"]["properties"]["window"]
    assert (window["type"], window["minimum"]) == ("integer", 1)
    assert answer["default"]["policy"] == "snapkv"


def test_metrics_count_compactions_by_policy(server: Server, client: OpenAI) -> None:
    def totals() -> list[float]:
        return [
            server.metric(f"longreach_kv_{name}_total", policy="pyramidkv")
            for name in ("compactions", "tokens_seen", "tokens_kept", "blocks_freed", "compaction_seconds")
        ]

    before = totals()
    usage = usage_of(ask(client, {"policy": "pyramidkv", "budget": 512}))
    compactions, seen, kept, freed, seconds = (b - a for a, b in zip(before, totals(), strict=True))
    assert compactions == 1
    assert seen == usage["prompt_tokens"]
    assert kept == pytest.approx(usage["kept_tokens"]["mean"])
    assert freed == usage["bytes_freed"] / ((usage["bytes_held"] + usage["bytes_freed"]) / -(-seen // 32))
    assert seconds > 0


def test_concurrent_policies_answer_as_alone_and_leave_nothing(server: Server, client: OpenAI) -> None:
    wishes = [{"policy": "none"}, {"policy": "snapkv", "budget": 300}, {"policy": "streamingllm", "budget": 300}]

    def answer(i: int) -> str:
        text = f"{DOCUMENT[: 900 + 150 * i]} The pass key is {10000 + 7919 * i}. What is the pass key?"
        return str(ask(client, wishes[i % 3], text).choices[0].message.content)

    alone = [answer(i) for i in range(6)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(answer, [*range(6), *range(6)]))
    # bfloat16 rounds differently in other batch shapes, so a tie may fall the other way; float32 and exact equality
    # are tests/engine's business.
    assert sum(a == b for a, b in zip(alone * 2, together, strict=True)) >= 10
    server.wait_until_empty()


def test_a_client_that_leaves_frees_its_blocks(server: Server, client: OpenAI) -> None:
    stream = ask(client, {"policy": "snapkv", "budget": 400}, stream=True, max_tokens=2000)
    for _, _chunk in zip(range(4), stream, strict=False):
        pass
    assert server.metric("vllm:kv_cache_usage_perc") > 0
    stream.close()
    server.wait_until_empty()


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_end_by_a_stop_string_have_usage(client: OpenAI, stream: bool) -> None:
    """vLLM finds stop strings outside the engine, which then never sends a last output."""
    more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = ask(client, {"policy": "snapkv", "budget": 400}, stop=["48"], **more)
    last = list(answer)[-1] if stream else answer
    assert usage_of(last)["bytes_freed"] > 0
    assert last.usage.completion_tokens < TOKENS
