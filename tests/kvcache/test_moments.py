"""The moments of a prompt's queries, and what Expected Attention makes of them."""

from __future__ import annotations

import math

import pytest
import torch

import kvcache.observers.moments
from kvcache.evidence import LayerEvidence
from kvcache.model import UNKNOWN, ModelFacts
from kvcache.observers.moments import QueryMoments
from kvcache.policies.expectedattention import ExpectedAttention, expected_logits
from kvcache.registry import make_policy
from kvcache.rotary import Rotary
from tests.device import DEVICE
from tests.kvcache.synthetic import HEAD_DIM, ROTARY, PagedCache, rotary_table

PROMPT, HEADS, LAYERS = 150, 3, 2


def rotated(plain: torch.Tensor, rotary: Rotary = ROTARY) -> torch.Tensor:
    """Queries [n, H, d] as attention sees them."""
    return rotary.rotate(plain.to(DEVICE), torch.arange(len(plain), device=DEVICE)[:, None])


def gather(queries: torch.Tensor, chunks: list[int], model: ModelFacts) -> torch.Tensor:
    """Moments [layers, H, 1 + d, d] of queries [layers, n, H, d] that come in these chunks; back on the CPU."""
    assert sum(chunks) == queries.shape[1]
    moments, start = QueryMoments(len(queries), queries.shape[1], model), 0
    for size in chunks:
        begin, end = moments.overlap(start, start + size)
        for layer in reversed(range(len(queries))):
            if begin < end:
                moments.record(layer, begin, queries[layer, begin:end].to(DEVICE))
        start += size
    assert not moments.missing
    return torch.stack([moments.found(layer) for layer in range(len(queries))]).cpu()


@pytest.mark.parametrize("offset", [0.0, 100.0], ids=["centred", "biased"])
@pytest.mark.parametrize(
    "chunks", [[PROMPT], [1] * PROMPT, [3, 2, 145], [4, 146], [64, 64, 22], [PROMPT - 1, 1]], ids=str
)
def test_moments_are_those_of_queries_before_rope(
    chunks: list[int], offset: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the fifth on, however they come; a bias as in Qwen's queries doesn't drown the covariance."""
    torch.manual_seed(0)
    plain = torch.randn(LAYERS, PROMPT, HEADS, HEAD_DIM, dtype=torch.float64) * torch.linspace(0.5, 2, HEAD_DIM)
    plain[:, :4] = 1e4
    plain += offset
    double = Rotary(ROTARY.table, ROTARY.neox)
    queries = torch.stack([rotated(layer.float(), double) for layer in plain])
    found = gather(queries, chunks, ModelFacts(ROTARY))
    assert found.dtype == torch.float32 and found.shape == (LAYERS, HEADS, 1 + HEAD_DIM, HEAD_DIM)
    counted = plain[:, 4:].transpose(1, 2)
    mean = counted.mean(2)
    around = counted - mean[:, :, None]
    covariance = around.transpose(-1, -2) @ around / (PROMPT - 4)
    torch.testing.assert_close(found[:, :, 0].double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[:, :, 1:].double(), covariance, rtol=2e-4, atol=2e-4)
    monkeypatch.setattr(kvcache.observers.moments, "_MAX_ELEMENTS", 7 * HEADS * HEAD_DIM)
    torch.testing.assert_close(gather(queries, chunks, ModelFacts(ROTARY)), found, rtol=2e-4, atol=2e-4)


def test_fp8_queries_are_multiplied_with_their_scale() -> None:
    torch.manual_seed(0)
    stored = torch.randn(1, 40, HEADS, HEAD_DIM).to(torch.float8_e4m3fn)
    for raw in (stored, stored.view(torch.uint8)):
        found = gather(raw, [25, 15], ModelFacts(ROTARY, query_scales=(0.25,)))
        expected = gather(stored.float() * 0.25, [40], ModelFacts(ROTARY))
        torch.testing.assert_close(found, expected)


def test_what_is_wanted_is_known_without_the_model() -> None:
    """The scheduler cuts prefix-cache hits there; only a worker has the rotation."""
    policy = make_policy({"policy": "expectedattention"})
    assert policy is not None
    assert policy.first_query(2000) == 4 and policy.first_query(3) == 2
    (moments,) = policy.observers(1, 2000)
    assert isinstance(moments, QueryMoments) and moments.model is UNKNOWN
    with pytest.raises(RuntimeError, match="rotary embedding is not known"):
        moments.record(0, 4, torch.zeros(1, HEADS, HEAD_DIM))
    both = make_policy({"policy": "expectedattention", "layers": "zigzag"})
    assert both is not None
    assert [observer.name for observer in both.observers(1, 2000)] == ["window_queries", "query_moments"]


def test_memory_is_taken_with_the_first_query_and_counted() -> None:
    moments = QueryMoments(LAYERS, PROMPT, ModelFacts(ROTARY))
    with pytest.raises(RuntimeError, match="no query has come yet"):
        moments.found(0)
    assert QueryMoments.nbytes(32, 32, 128) - QueryMoments.nbytes(0, 32, 128) == 32 * 32 * (128 + 128**2) * 4
    moments.record(0, 4, torch.randn(2, HEADS, HEAD_DIM).to(DEVICE))
    held = [moments._mean, moments._spread]
    assert sum(part.numel() * 4 for part in held if part is not None) == LAYERS * HEADS * (HEAD_DIM + HEAD_DIM**2) * 4


def test_expected_exponential_is_that_of_gaussian_queries() -> None:
    """A14: E[exp(q . k / sqrt(d))] = exp(z), by a million draws."""
    generator = torch.Generator().manual_seed(0)
    d, draws = 4, 1_000_000
    mean, root = torch.randn(d, generator=generator) / 4, torch.randn(d, d, generator=generator) / 4
    keys = torch.randn(5, d, generator=generator)
    queries = mean + torch.randn(draws, d, generator=generator) @ root.T
    drawn = (queries.double() @ keys.T.double() / math.sqrt(d)).exp().mean(0)
    formula = expected_logits(keys, mean[None], (root @ root.T)[None], d**-0.5)[0].exp().double()
    torch.testing.assert_close(formula, drawn, rtol=2e-3, atol=0)


def evidence(keys: torch.Tensor, values: torch.Tensor, moments: torch.Tensor, rotary: Rotary | None) -> LayerEvidence:
    facts = ModelFacts(Rotary(rotary.table.to(DEVICE), rotary.neox) if rotary else None)
    observed = {"query_moments": moments.to(DEVICE)}
    return LayerEvidence(0, keys.to(DEVICE), values.to(DEVICE), None, keys.shape[-1] ** -0.5, observed, facts)


def test_scores_of_queries_that_are_all_alike() -> None:
    """No covariance, a rotation by nothing: the softmax of one query's logits, times |v|; sinks outside of it."""
    still = Rotary(torch.tensor([[1.0, 0.0]]), neox=True)
    keys, values = (
        torch.tensor([[[50.0, 0.0], [1, 0], [0, 1], [2, 0]]]),
        torch.tensor([[[1.0, 0], [3, 4], [1, 0], [0, 2]]]),
    )
    query = torch.tensor([2**0.5, 0.0])
    moments = torch.cat((query[None], torch.zeros(2, 2)))[None]
    policy = ExpectedAttention(ExpectedAttention.Args.model_validate({"sinks": 1, "epsilon": 0.5}))
    scores = policy.scores(evidence(keys, values, moments, still))
    weights = [math.e, 1.0, math.e**2]
    expected = [(w / sum(weights) + 0.5) * length for w, length in zip(weights, [5, 1, 2], strict=True)]
    torch.testing.assert_close(scores.cpu(), torch.tensor([[math.inf, *expected]]))
    plain = ExpectedAttention(ExpectedAttention.Args.model_validate({"sinks": 1, "epsilon": 0.0, "weighting": "none"}))
    found = plain.scores(evidence(keys, values, moments, still))
    torch.testing.assert_close(found[0, 1:].cpu(), torch.tensor(weights) / sum(weights))


def test_groups_are_averaged_and_heads_kept_apart() -> None:
    torch.manual_seed(0)
    cache = PagedCache(60, num_heads=6, num_kv_heads=2)
    moments = gather(cache.queries[:1], [60], ModelFacts(ROTARY))[0]
    keys, values = cache.keys[0], cache.values[0]
    policy = ExpectedAttention(ExpectedAttention.Args.model_validate({"epsilon": 0.0}))
    whole = policy.scores(evidence(keys, values, moments, ROTARY))
    for head in range(2):
        alone = [
            policy.scores(evidence(keys[head : head + 1], values[head : head + 1], moments[i : i + 1], ROTARY))
            for i in range(3 * head, 3 * head + 3)
        ]
        torch.testing.assert_close(whole[head : head + 1], torch.stack(alone).mean(0))


def test_half_precision_keys_score_in_float32() -> None:
    cache = PagedCache(60)
    moments = gather(cache.queries[:1].bfloat16(), [60], ModelFacts(Rotary(ROTARY.table.bfloat16(), True)))[0]
    policy = ExpectedAttention(ExpectedAttention.Args.model_validate({}))
    found = policy.scores(evidence(cache.keys[0].bfloat16(), cache.values[0].bfloat16(), moments, ROTARY))
    assert found.dtype == torch.float32 and found.shape == (2, 60) and not found.isnan().any()


@pytest.mark.parametrize("lacks", ["moments", "rotary"])
def test_without_evidence_scores_are_an_error(lacks: str) -> None:
    keys, table = torch.zeros(1, 8, 4), rotary_table(16, 4, 100.0)
    observed = {} if lacks == "moments" else {"query_moments": torch.zeros(1, 5, 4)}
    given = LayerEvidence(
        0, keys, keys, None, 1.0, observed, ModelFacts(None if lacks == "rotary" else Rotary(table, True))
    )
    with pytest.raises(ValueError, match="moments of the prompt's queries are needed"):
        ExpectedAttention(ExpectedAttention.Args.model_validate({})).scores(given)
