"""The engine client, over a stand-in for vLLM's: what requests are given, and what is made of their outputs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from attention_plugins.decode.registry import FIELD
from kvcache.usage import TOTALS
from kvcache.vllm_adapter.scheduler import EXTRA_ARG
from server.access.keys import Key
from server.access.meters import Meter
from server.access.metrics import KeyMetrics
from server.access.middleware import Visitor, current_visitor
from server.engine import LongreachLLM
from server.metrics import AuditMetrics, CompressionMetrics, DecodeMetrics, PrefillMetrics
from server.policies import PolicyDesk
from server.scope import RequestScope, current_scope
from tests.server.asgi import desks

USAGE = {"policy": "random", "prompt_tokens": 9}
PROMPT = {"prompt_token_ids": list(range(100))}
Engine = Callable[..., "Fake"]


def told(compactions: int = 1, **others: Any) -> dict[str, Any]:
    totals = {"random": {**dict.fromkeys(TOTALS, 0), "compactions": compactions}}
    return {EXTRA_ARG: {"usage": USAGE, "totals": totals}, **others}


def output(params: dict[str, Any] | None = None, finished: bool = False) -> Any:
    return SimpleNamespace(kv_transfer_params=params, finished=finished, prompt_token_ids=[1, 2, 3])


class Fake:
    """A `LongreachLLM` that was never started; `calls` are what reached vLLM's `generate`, `closed` how many ended."""

    def __init__(self, desk: PolicyDesk, blocks: int, selector: dict[str, Any] | None) -> None:
        self.registry = CollectorRegistry()
        self.llm = LongreachLLM.__new__(LongreachLLM)
        self.llm.desks = desks(desk, default=selector)
        self.llm.metrics = CompressionMetrics("m", self.registry)
        self.llm.decode_metrics = DecodeMetrics("m", self.registry)
        self.llm.prefill_metrics = PrefillMetrics("m", self.registry)
        self.llm.vllm_config = SimpleNamespace(
            cache_config=SimpleNamespace(num_gpu_blocks=blocks), lora_config=None
        )  # fmt: skip
        self.calls: list[tuple[Any, SamplingParams, str, dict[str, Any]]] = []
        self.closed = 0

    def compactions(self) -> float | None:
        labels = {"model_name": "m", "policy": "random"}
        return self.registry.get_sample_value("longreach_kv_compactions_total", labels)

    def generate(self, scope: RequestScope | None = None, **extra: Any) -> list[Any]:
        async def run() -> list[Any]:
            current_scope.set(scope)
            return [item async for item in self.llm.generate(PROMPT, SamplingParams(**extra), "id", priority=3)]

        return asyncio.run(run())


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    def make(
        outputs: list[Any],
        desk: PolicyDesk | None = None,
        blocks: int = 1000,
        selector: dict[str, Any] | None = None,
    ) -> Fake:
        fake = Fake(desk or PolicyDesk({"policy": "random"}, 16), blocks, selector)

        async def generate(self: Any, prompt: Any, params: Any, name: str, **kwargs: Any) -> AsyncGenerator[Any, None]:
            fake.calls.append((prompt, params, name, kwargs))
            try:
                for item in outputs:
                    yield item
            finally:
                fake.closed += 1

        monkeypatch.setattr(AsyncLLM, "generate", generate)
        return fake

    return make


def test_requests_get_their_policy_or_the_servers(engine: Engine) -> None:
    fake = engine([])
    fake.generate(RequestScope({"kv_cache": {"policy": "none"}}), extra_args={"x": 1})
    fake.generate(RequestScope())
    fake.generate()  # not from a request
    assert [call[1].extra_args for call in fake.calls] == [
        {"x": 1, EXTRA_ARG: {"policy": "none"}},
        {EXTRA_ARG: fake.llm.desks.policies.default},
        {EXTRA_ARG: fake.llm.desks.policies.default},
    ]
    assert fake.calls[0][0] is PROMPT
    assert fake.calls[0][2:] == ("id", {"priority": 3})


def test_checks_are_counted(engine: Engine) -> None:
    fake = engine([output(told()), output({EXTRA_ARG: {**told()[EXTRA_ARG], "audits": 7}}, finished=True)])
    fake.llm.audit_metrics = AuditMetrics("m", fake.registry)
    fake.generate()
    assert fake.registry.get_sample_value("longreach_kv_audits_total", {"model_name": "m"}) == 7


@pytest.mark.parametrize("cpu, lora", [(True, True), (True, False), (False, True)])
def test_what_would_end_the_engine_is_refused(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, cpu: bool, lora: bool
) -> None:
    """A prompt's log-probabilities beside adapters, on CPUs."""
    monkeypatch.setattr("server.engine.current_platform", SimpleNamespace(is_cpu=lambda: cpu))
    fake = engine([])
    fake.llm.vllm_config.lora_config = object() if lora else None
    fake.generate()
    if cpu and lora:
        with pytest.raises(VLLMValidationError, match="prompt_logprobs can't be had on CPUs beside LoRA adapters"):
            fake.generate(prompt_logprobs=0)
    else:
        fake.generate(prompt_logprobs=0)
    assert len(fake.calls) == (1 if cpu and lora else 2)


def test_what_the_engine_tells_goes_to_the_answer_and_the_metrics(engine: Engine) -> None:
    fake, scope = engine([output(), output(told(2), finished=True)]), RequestScope()
    outputs = fake.generate(scope)
    assert [item.kv_transfer_params for item in outputs] == [None, None]
    assert scope.usage == {"kv_cache": [USAGE]}
    assert fake.compactions() == 2


def test_only_the_last_output_counts(engine: Engine) -> None:
    """With n > 1 a stream shows one for every sample; an answer in one piece only shows the last."""
    fake, scope = engine([output(told(1)), output(told(2), finished=True)]), RequestScope()
    assert [item.kv_transfer_params for item in fake.generate(scope)] == [None, None]
    assert (scope.usage, fake.compactions()) == ({"kv_cache": [USAGE]}, 2)


def test_metrics_count_without_a_request_too(engine: Engine) -> None:
    fake = engine([output(told(3), finished=True)])
    fake.generate()
    assert fake.compactions() == 3


def test_an_output_without_our_dictionary_tells_nothing(engine: Engine) -> None:
    """As when vLLM finds a stop string before the engine has ended the request, or aborts it."""
    fake, scope = engine([output(finished=True)]), RequestScope()
    assert len(fake.generate(scope)) == 1
    assert (scope.usage, fake.compactions()) == ({}, None)


TIDAL = {
    "selector": "tidal",
    "tokens": 512,
    "min_context": 0,
    "kernel": 1,
    "window": 32,
    "pinned": 0.5,
    "heads": "shared",
}
DECODED = {**TIDAL, "steps": {"select": 3}}


def decode_told(**others: Any) -> dict[str, Any]:
    params = told()
    params[EXTRA_ARG] |= {"decode_usage": DECODED, "decode_totals": {"tidal": {"select": 8}}, **others}
    return params


def test_requests_get_their_selector_or_the_servers(engine: Engine) -> None:
    fake = engine([], selector=TIDAL)
    fake.generate(RequestScope({FIELD: {"selector": "quest"}}))
    fake.generate(RequestScope())
    fake.generate()
    fake.generate(RequestScope({FIELD: {"selector": "dense"}}), extra_args={FIELD: {"selector": "quest"}})
    given = [call[1].extra_args for call in fake.calls]
    assert [args.get(FIELD) for args in given] == [{"selector": "quest"}, TIDAL, TIDAL, None]
    assert [args[EXTRA_ARG] for args in given] == [fake.llm.desks.policies.default] * 4


def test_steps_go_to_the_answer_and_the_metrics(engine: Engine) -> None:
    fake, scope = engine([output(decode_told(), finished=True)]), RequestScope({FIELD: TIDAL})
    assert fake.generate(scope)[0].kv_transfer_params is None
    assert scope.usage == {"kv_cache": [USAGE], FIELD: [DECODED]}
    labels = {"model_name": "m", "selector": "tidal", "mode": "select"}
    assert fake.registry.get_sample_value("longreach_decode_steps_total", labels) == 8


@pytest.mark.parametrize("usage", [{"decode_usage": None, "decode_totals": {}}, {"decode_usage": None}])
def test_reading_everything_is_told_only_to_those_who_asked_for_it(engine: Engine, usage: dict[str, Any]) -> None:
    for asked, expected in (({}, None), ({FIELD: {"selector": "dense"}}, [{"selector": "dense"}])):
        scope = RequestScope(dict(asked))
        engine([output(decode_told(**usage), finished=True)]).generate(scope)
        assert scope.usage.get(FIELD) == expected


def test_a_stock_engine_reads_everything(engine: Engine) -> None:
    desk = PolicyDesk({"policy": "none"}, 16, unavailable="no adapter")
    scope = RequestScope({FIELD: {"selector": "dense"}})
    fake = engine([output(finished=True)], desk)
    fake.generate(scope)
    assert (scope.usage[FIELD], fake.calls[0][1].extra_args) == ([{"selector": "dense"}], None)


def test_a_stock_engine_keeps_everything(engine: Engine) -> None:
    """Where policies can't run: vLLM's own scheduler, maybe with a KV connector."""
    desk = PolicyDesk({"policy": "none"}, 16, unavailable="no adapter")
    connector = {"remote_block_ids": [1]}
    fake, scope = (
        engine([output(), output(connector, finished=True)], desk, blocks=1),
        RequestScope({"kv_cache": {"policy": "none"}}),
    )
    assert fake.generate(scope)[-1].kv_transfer_params == connector
    kept = {"policy": "none", "prompt_tokens": 3, "kept_tokens": {"mean": 3.0, "min": 3.0, "max": 3.0}}
    assert scope.usage == {"kv_cache": [kept]}
    assert fake.calls[0][1].extra_args is None
    assert fake.compactions() is None


def test_a_prompt_that_never_fits_is_refused_before_the_answer_begins(engine: Engine) -> None:
    """100 tokens are 7 blocks, and 64 kept ones 3 more beside the tail; one block is vLLM's own."""
    words = {"policy": "random", "budget": 68, "recent": 1, "sinks": 4}
    desk = PolicyDesk(words, 16)
    assert engine([], desk, blocks=12).generate() == []
    fake = engine([], desk, blocks=11)
    for words in ({"policy": "raas", "budget": 68}, {"policy": "lra", "budget": 120}):
        assert engine([], PolicyDesk(words, 16), blocks=2).generate() == [], "only its answer is compacted, maybe"
    suffix = PolicyDesk({"policy": "random", "budget": 68, "recent": 1, "sinks": 4, "suffix": 16}, 16)
    assert engine([], suffix, blocks=12).generate() == []
    with pytest.raises(VLLMValidationError, match="need 11 blocks"):
        engine([], suffix, blocks=11).generate()
    with pytest.raises(VLLMValidationError, match="need 11 blocks of 16 tokens at once, the KV cache has 10") as caught:
        fake.llm.generate(PROMPT, SamplingParams(), "id")  # not yet iterated
    assert caught.value.parameter == "kv_cache.budget"
    assert fake.calls == []


@pytest.mark.parametrize("prompt", ["text", {"prompt_embeds": object()}, {"prompt_token_ids": [1] * 20}])
def test_prompts_of_other_kinds_or_short_ones_are_not_held_up(engine: Engine, prompt: Any) -> None:
    engine([], blocks=2).llm.generate(prompt, SamplingParams(), "id")


def test_without_a_policy_the_pool_is_vllms_business(engine: Engine) -> None:
    assert engine([], PolicyDesk({"policy": "none"}, 16), blocks=2).generate() == []


def test_leaving_early_ends_the_engines_request(engine: Engine) -> None:
    fake = engine([output(), output()])

    async def leave() -> None:
        outputs = fake.llm.generate(PROMPT, SamplingParams(), "id")
        await anext(outputs)
        await outputs.aclose()
        assert fake.closed == 1

    asyncio.run(leave())


def test_what_a_pattern_computed_goes_to_the_answer_and_the_metrics(engine: Engine) -> None:
    usage = {"pattern": "streaming", "tokens": 9, "density": {"mean": 0.25, "by_layer": [0.25]}}
    totals = {"streaming": {"prompts": 1, "tokens": 9, "pairs": 8, "pairs_computed": 2}}
    content = told()
    content[EXTRA_ARG] |= {"prefill_usage": usage, "prefill_totals": totals}
    fake, scope = engine([output(content, finished=True)]), RequestScope()
    fake.generate(scope)
    assert scope.usage["prefill_attention"] == [usage]
    labels = {"model_name": "m", "pattern": "streaming"}
    assert fake.registry.get_sample_value("longreach_prefill_pairs_computed_total", labels) == 2
    assert fake.registry.get_sample_value("longreach_prefill_prompts_total", labels) == 1


def test_dense_prompts_are_vllms_business_and_told_to_those_who_asked(engine: Engine) -> None:
    fake, scope = engine([output(told(), finished=True)]), RequestScope({"prefill_attention": {"pattern": "dense"}})
    fake.generate(scope)
    assert "prefill_attention" not in fake.calls[0][1].extra_args
    assert scope.usage["prefill_attention"] == [{"pattern": "dense"}]
    words = {"pattern": "streaming", "sinks": 4}
    fake.generate(RequestScope({"prefill_attention": words}))
    assert fake.calls[1][1].extra_args["prefill_attention"] == words


def visit(fake: Fake, own_cache: bool = False, salt: str | None = None, **extra: Any) -> tuple[Any, dict[str, float]]:
    """The prompt that reached vLLM, and what a visitor was charged."""
    registry = CollectorRegistry()
    key = Key("alice", b"\xab" * 32, own_cache=own_cache)
    visitor = Visitor(key, Meter(key), KeyMetrics(registry))
    prompt = {**PROMPT, "cache_salt": salt} if salt else PROMPT

    async def run() -> None:
        current_visitor.set(visitor)
        async for _ in fake.llm.generate(prompt, SamplingParams(**extra), "id"):
            pass

    asyncio.run(run())
    kinds = ("prompt", "generated")
    labels = [{"key": "alice", "kind": kind} for kind in kinds]
    found = [registry.get_sample_value("longreach_key_tokens_total", label) for label in labels]
    return fake.calls[-1][0], {kind: value for kind, value in zip(kinds, found, strict=True) if value is not None}


def part(*lengths: int, finished: bool = False) -> Any:
    one = output(finished=finished)
    one.outputs = [SimpleNamespace(token_ids=[0] * length) for length in lengths]
    return one


@pytest.mark.parametrize(
    "kind, outputs, generated",
    [
        (RequestOutputKind.DELTA, [part(2), part(1, 3), part(1, finished=True)], 7),
        (RequestOutputKind.CUMULATIVE, [part(2), part(4), part(5, 2, finished=True)], 7),
        (RequestOutputKind.FINAL_ONLY, [part(5, 2, finished=True)], 7),
        (RequestOutputKind.DELTA, [part(2), part(1)], 3),  # the client left
    ],
)
def test_tokens_are_charged_to_the_visitors_key(
    kind: RequestOutputKind, outputs: list[Any], generated: int, engine: Engine
) -> None:
    prompt, charged = visit(engine(outputs), output_kind=kind)
    assert charged == {"prompt": 100, "generated": generated}
    assert prompt == PROMPT


def test_an_empty_prompt_is_vllms_to_refuse(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROMPT, "prompt_token_ids", [])
    assert visit(engine([part(finished=True)]))[1] == {"prompt": 0, "generated": 0}


def test_a_key_may_have_a_cache_of_its_own(engine: Engine) -> None:
    """What a client puts as its salt can't be that of another key, whose hash it doesn't know."""
    fake = engine([part(1, finished=True)])
    assert visit(fake, own_cache=True)[0]["cache_salt"] == "ab" * 32 + "/"
    assert visit(fake, own_cache=True, salt="mine")[0]["cache_salt"] == "ab" * 32 + "/mine"
    assert visit(fake, salt="mine")[0]["cache_salt"] == "mine"
    assert "cache_salt" not in PROMPT
