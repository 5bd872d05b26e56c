"""Column sums: the observer against loops, and H2O's and D2O's numbers."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

import kvcache.scorers
from kvcache.allocators.d2o import D2OLayers
from kvcache.evidence import LayerEvidence, QuantScales, dequantise
from kvcache.observers.column_sums import ColumnSums
from kvcache.policies.base import Policy
from kvcache.policies.h2o import H2O
from kvcache.policies.observedattention import ObservedAttention
from kvcache.registry import make_policy
from kvcache.scorers import column_sums
from kvcache.selection import force, keep_top
from tests.device import DEVICE
from tests.kvcache import brute_force
from tests.kvcache.synthetic import HEAD_DIM, SCALE, PagedCache

PROMPT, LAYER = 71, 2
ROWS = [[1.0], [0.6, 0.4], [0.5, 0.1, 0.4], [0.4, 0.05, 0.25, 0.3]]
SUMS = [2.5, 0.55, 0.65, 0.3]


def with_probabilities(rows: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [n, 1, n] and keys [1, n, n] whose causal softmax at scale 1 has these rows."""
    queries = torch.zeros(len(rows), 1, len(rows))
    for i, row in enumerate(rows):
        queries[i, 0, : len(row)] = torch.tensor(row).log()
    return queries.to(DEVICE), torch.eye(len(rows), device=DEVICE)[None]


def observed(sums: torch.Tensor) -> LayerEvidence:
    """A layer with these column sums, [num_kv_heads, n]."""
    keys = torch.zeros(*sums.shape, 4, device=DEVICE)
    return LayerEvidence(0, keys, keys, None, 1.0, {"column_sums": sums.to(DEVICE)})


def test_sums_of_four_tokens() -> None:
    queries, keys = with_probabilities(ROWS)
    torch.testing.assert_close(column_sums(queries, keys, 1.0, 0).cpu(), torch.tensor([SUMS]))
    parts = [column_sums(queries[:3], keys[:, :3], 1.0, 0).cpu(), column_sums(queries[3:], keys, 1.0, 3).cpu()]
    torch.testing.assert_close(parts[0], torch.tensor([[2.1, 0.5, 0.4]]))
    torch.testing.assert_close(parts[1], torch.tensor([ROWS[3]]))


@pytest.mark.parametrize(("tokens", "share", "kept"), [(2, 0.5, [0, 3]), (3, 1 / 3, [0, 2, 3]), (2, 1, [2, 3])])
def test_h2o_of_four_tokens(tokens: int, share: float, kept: list[int]) -> None:
    """One or two heavy hitters beside one recent token; recent tokens alone."""
    policy = H2O(H2O.Args.model_validate({"sinks": 0, "recent_share": share}))
    scores = policy.scores(observed(torch.tensor([SUMS])))
    scores = force(scores, 0, policy.recent_of(torch.tensor([tokens])))
    assert keep_top(scores, torch.tensor([tokens])).tolist() == [kept]


def test_observedattention_of_four_tokens() -> None:
    policy = ObservedAttention(ObservedAttention.Args.model_validate({"sinks": 0, "recent": 0}))
    scores = policy.scores(observed(torch.tensor([SUMS])))
    torch.testing.assert_close(scores.cpu(), torch.tensor([[0.625, 0.55 / 3, 0.325, 0.3]]))
    assert keep_top(scores, torch.tensor([2])).tolist() == [[0, 2]]


def test_heavy_hitters_and_recent_tokens_share_what_a_head_keeps() -> None:
    policy = H2O(H2O.Args.model_validate({"sinks": 5, "recent_share": 0.29}))
    tokens = torch.tensor([[100, 200], [6, 5], [3, 0]])
    assert policy.recent_of(tokens).tolist() == [[29, 58], [1, 0], [0, 0]]
    greedy = H2O(H2O.Args.model_validate({"sinks": 5, "recent_share": 1}))
    assert greedy.recent_of(tokens).tolist() == [[95, 195], [1, 0], [0, 0]], "sinks have the first claim"


@pytest.mark.parametrize("sinks", [0, 2])
def test_rows_may_be_forced_by_numbers_of_their_own(sinks: int) -> None:
    scores = torch.tensor([[0.0, 1, 2, 3], [0, math.nan, 2, 3]], device=DEVICE)
    forced = force(scores, sinks, torch.tensor([3, -1]))
    both = torch.stack([force(scores[0], sinks, 3), force(scores[1], sinks, 0)])
    assert torch.equal(forced, both) and torch.equal(force(scores, sinks, -1), force(scores, sinks, 0))


def feed(cache: PagedCache, chunks: list[int]) -> ColumnSums:
    observer, first = ColumnSums(4, cache.prompt_len), 0
    paged = cache.compressor()
    for size in chunks:
        seen = cache.blocks[: -(-(first + size) // cache.page_size)]
        for layer in range(4):
            queries = cache.queries[layer, first : first + size]
            observer.record(
                layer,
                first,
                queries,
                partial(paged.evidence, layer, cache.geometry.pages_of(layer, seen), first + size),
            )
        first += size
    return observer


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 2)], ids=str)
@pytest.mark.parametrize(
    "chunks", [[PROMPT], [1] * PROMPT, [32, 32, 7], [70, 1], [1, 70]], ids=lambda c: f"{len(c)} chunks"
)
def test_any_chunks_give_the_sums_by_hand(chunks: list[int], heads: tuple[int, int]) -> None:
    cache = PagedCache(PROMPT, num_heads=heads[0], num_kv_heads=heads[1], uneven=True)
    observer, group = feed(cache, chunks), heads[0] // heads[1]
    assert observer.missing == 0 and observer.first == 0
    for layer in (0, 3):
        found = observer.found(layer).cpu()
        assert found.dtype == torch.float32 and found.shape == (heads[1], PROMPT)
        torch.testing.assert_close(found.sum(1), torch.full((heads[1],), float(PROMPT)))
        for head in range(heads[1]):
            queries = cache.queries[layer, :, head * group : (head + 1) * group].transpose(0, 1).tolist()
            expected = brute_force.column_sums(queries, cache.keys[layer, head].tolist(), SCALE)
            torch.testing.assert_close(found[head], torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("most", [1, 100, 1000, 10_000, 1 << 30])
@pytest.mark.parametrize("first", [0, 40])
def test_pieces_of_any_size_give_the_same_sums(first: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only memory is bounded: one query of one KV head is the least that is taken."""
    torch.manual_seed(0)
    queries, keys = torch.randn(60, 6, 8), torch.randn(3, 60 + first, 8)
    monkeypatch.setattr(kvcache.scorers, "_MAX_COLUMN_LOGITS", 1 << 40)
    whole = column_sums(queries, keys, 0.5, first)
    monkeypatch.setattr(kvcache.scorers, "_MAX_COLUMN_LOGITS", most)
    torch.testing.assert_close(column_sums(queries, keys, 0.5, first), whole, rtol=1e-5, atol=1e-6)


def test_keys_behind_the_queries_are_not_looked_at() -> None:
    """A chunk's evidence may reach further than the queries that are wanted of it."""
    queries, keys = torch.randn(5, 2, 8), torch.randn(2, 30, 8)
    expected = column_sums(queries, keys[:, :15], 1.0, 10)
    keys[:, 15:] = math.nan
    assert torch.equal(column_sums(queries, keys, 1.0, 10), expected)


def test_sums_over_fp8_pages() -> None:
    """Queries and keys are multiplied with their scales. On the CPU: tests/kernels has fp8 on a GPU."""
    cache, quant = PagedCache(PROMPT, num_heads=6, num_kv_heads=2, device="cpu"), QuantScales(0.5, 0.25, 9.0)
    generator = torch.Generator().manual_seed(0)
    cache.pages = torch.randint(0, 0x50, cache.pages.shape, dtype=torch.uint8, generator=generator)
    raw = torch.randint(0, 0x50, (PROMPT, 6, HEAD_DIM), dtype=torch.uint8, generator=generator)
    compressor = cache.compressor()
    compressor.quant = [quant] * 4
    evidence = compressor.evidence(LAYER, cache.geometry.pages_of(LAYER, cache.blocks), PROMPT)
    observer = ColumnSums(4, PROMPT)
    observer.record(LAYER, 0, raw.view(torch.float8_e4m3fn), lambda: evidence)
    expected = column_sums(dequantise(raw, 0.5), evidence.keys, SCALE, 0)
    assert torch.equal(observer.found(LAYER), expected)
    assert not torch.allclose(expected, column_sums(dequantise(raw, 1.0), evidence.keys, SCALE, 0))


def test_memory_is_taken_with_the_first_query() -> None:
    observer = ColumnSums(2, 9)
    with pytest.raises(RuntimeError, match="no query has come yet"):
        observer.found(0)
    with pytest.raises(ValueError, match="need the keys"):
        observer.record(0, 0, torch.zeros(1, 2, 8))


def test_evidence_without_sums_is_an_error() -> None:
    keys = torch.zeros(1, 8, 4)
    for policy in ("h2o", "observedattention", "d2o"):
        with pytest.raises(ValueError, match="column sums are needed and were not observed"):
            built(policy).scores(LayerEvidence(0, keys, keys, None, 1.0))


def built(policy: str, **words: object) -> Policy:
    made = make_policy({"policy": policy, **words})
    assert made is not None
    return made


def d2o(**arguments: int) -> D2OLayers:
    return D2OLayers(D2OLayers.Args.model_validate(arguments))


def test_d2o_shares() -> None:
    v = torch.tensor([0.08, 0.05, 0.02, 0.02], dtype=torch.float64)
    shares = d2o().shares(4, 200, 1000, v)
    assert (shares / 1000).tolist() == pytest.approx([0.1926, 0.1984, 0.2045, 0.2045], abs=5e-5)
    assert float(shares.sum()) == pytest.approx(4 * 200, abs=1e-9)


def test_d2o_variance_is_scaled_over_heads() -> None:
    sums = torch.tensor([[4.0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 0, 0]])  # variances 3, 0, 1
    statistic = d2o().statistic(observed(sums))
    assert statistic.shape == () and float(statistic) == pytest.approx((1 + 0 + 1 / 3) / 3, abs=1e-6)
    assert float(statistic) == pytest.approx(brute_force.d2o_variance(sums.tolist()))
    assert float(d2o().statistic(observed(sums[:1]))) == 0, "one head has nothing to be compared with"
    sums[1, 2] = math.nan
    assert float(d2o().statistic(observed(sums))) == 0, "nothing known: the largest share"


@pytest.mark.parametrize(
    ("first", "last", "prompt_len", "shares"),
    [
        (1, 1, 250, [250, 175, 175, 175, 175, 250]),
        (1, 1, 1000, [300, 150, 150, 150, 150, 300]),  # whole would be more than half of all tokens
        (1, 0, 500, [500, 140, 140, 140, 140, 140]),
        (0, 1, 2000, [120, 120, 120, 120, 120, 600]),
        (3, 2, 1000, [200, 200, 200, 200, 200, 200]),  # half would be less than the others get
        (4, 4, 1000, [200] * 6),
        (0, 0, 1000, [200] * 6),
    ],
)
def test_d2o_layers_that_stay_whole(first: int, last: int, prompt_len: int, shares: list[float]) -> None:
    found = d2o(whole_first=first, whole_last=last).shares(6, 200, prompt_len, torch.zeros(6, dtype=torch.float64))
    assert found.tolist() == pytest.approx(shares)
    assert float(found.sum()) == pytest.approx(1200)
