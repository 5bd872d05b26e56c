"""Moments and spectrograms in the engine: gathered over chunks, of queries that the model itself rotated."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import kvcache.observers.spectrogram
from tests.engine.harness import PAGE, Engine, Job, same_kept
from tests.engine.test_answers import prompt_of
from tests.kvcache.synthetic import random_network
from tests.reference import Reference

pytestmark = pytest.mark.engine

WORDS: dict[str, Any] = {"policy": "expectedattention", "budget": 160}


@pytest.mark.parametrize("chunk", [64, 160, 640])
def test_chunked_prefill_keeps_the_same_tokens(engine: Engine, chunk: int) -> None:
    """The last chunk is one token."""
    prompt = prompt_of(641)
    (whole,) = engine.run([Job(prompt, WORDS)])
    engine.forget_prefixes()
    engine.set_chunk(chunk)
    (chunked,) = engine.run([Job(prompt, WORDS)])
    assert same_kept(whole, chunked)
    assert chunked.tokens == whole.tokens


def test_decoding_equals_dense_attention_with_evicted_columns_masked(engine: Engine, reference: Reference) -> None:
    (job,) = engine.run([Job(prompt_of(655), WORDS, max_tokens=40)])
    assert job.tokens == reference.greedy(job.prompt, 40, job.kept, tail_from=655 // PAGE * PAGE)[0]
    assert job.tokens != reference.greedy(job.prompt, 40)[0], "the policy changed nothing, so this test proves nothing"


def test_the_prompt_is_computed_again_and_keeps_the_same_tokens(engine: Engine) -> None:
    """Queries are cached nowhere, and nearly all of them are wanted."""
    prompt = prompt_of(640)
    (cold,) = engine.run([Job(prompt, WORDS)])
    (warm,) = engine.run([Job(prompt, WORDS)])
    assert warm.cached_tokens == 0
    assert same_kept(cold, warm) and warm.tokens == cold.tokens


def test_moments_are_those_of_the_models_queries_before_rope(
    engine: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The projections' outputs of transformers' model, which no rotation has touched."""
    plain: dict[int, torch.Tensor] = {}
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(
            lambda _, __, output, index=index: plain.__setitem__(index, output[0].unflatten(-1, (4, 32)))
        )
        for index, layer in enumerate(reference.model.model.layers)
    ]
    prompt = prompt_of(400)
    reference.greedy(prompt, 1)
    for hook in hooks:
        hook.remove()
    seen: list[torch.Tensor] = []
    scores = type(engine.compressor)._scores

    def spy(compressor: Any, request: Any, source: torch.Tensor) -> Any:
        (moments,) = request.observers
        seen.extend(moments.found(layer) for layer in range(3))
        return scores(compressor, request, source)

    monkeypatch.setattr(type(engine.compressor), "_scores", spy)
    engine.set_chunk(150)
    engine.run([Job(prompt, WORDS)])
    assert len(seen) == 3
    for layer, found in enumerate(seen):
        queries = plain[layer][4:].transpose(0, 1)
        torch.testing.assert_close(found[:, 0], queries.mean(1), rtol=1e-3, atol=1e-3)
        covariance = torch.stack([head.T.cov(correction=0) for head in queries])
        torch.testing.assert_close(found[:, 1:], covariance, rtol=1e-3, atol=1e-2)


def test_spectrograms_of_chunks_keep_the_same_tokens(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """NAMM with random weights, an update every 100 queries."""
    model = dataclasses.replace(engine.compressor.model, namm=random_network())
    monkeypatch.setattr(engine.compressor, "model", model)
    monkeypatch.setattr(kvcache.observers.spectrogram, "PERIOD", 100)
    prompt, words = prompt_of(641), {"policy": "namm", "budget": 160}
    (whole,) = engine.run([Job(prompt, words)])
    for chunk in (640, 90):
        engine.forget_prefixes()
        engine.set_chunk(chunk)
        (chunked,) = engine.run([Job(prompt, words)])
        assert same_kept(whole, chunked) and chunked.tokens == whole.tokens


def test_a_worker_says_what_it_lacks(engine: Engine) -> None:
    """A Llama's queries can be rotated back; weights for NAMM were not given."""
    (missing,) = engine.llm.collective_rpc("missing_evidence")
    assert list(missing) == ["attention spectrograms"] and "--kv-namm-weights" in missing["attention spectrograms"]
