"""The window's votes by kernels that read pages, against the naive twin on the same numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from kvcache.evidence import PagedEvidence, QuantScales, dequantise
from kvcache.pages import InterleavedCodec, PageGeometry, PermutedCodec
from kvcache.scorers import (
    GroupReduce,
    Pooling,
    pool,
    reduce_group,
    reduced_probabilities,
    window_attention,
    window_votes,
)

pytest.importorskip("triton")
# The interpreter's numpy warns of infinities and NaNs, which belong to these sums.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CUDA = torch.cuda.is_available()
ON_CUDA = pytest.mark.skipif(not CUDA, reason="needs a GPU")
# Triton's interpreter multiplies bfloat16 wrongly; float32 on a GPU is what `tests/kvcache --device cuda` has.
DTYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]
LAYER, LAYERS = 1, 3
POOLINGS = [("none", 5), ("avg", 1), ("avg", 5), ("avg", 21), ("max", 1), ("max", 5), ("max", 21)]


@dataclass(frozen=True)
class Case:
    """A layer of random keys and queries; only the layer's own pages are written, all else is NaN."""

    length: int
    window: int = 6
    heads: int = 2
    group: int = 3
    dim: int = 16
    page: int = 16
    dtype: torch.dtype = torch.float16
    block_major: bool = True
    seed: int = 0

    def make(self, device: torch.device) -> tuple[PagedEvidence, torch.Tensor]:
        """Evidence in pages, and its keys: [heads, length, dim]."""
        generator = torch.Generator().manual_seed(self.seed)
        keys = torch.randn(self.heads, self.length, self.dim, generator=generator).to(self.dtype)
        queries = 2 * torch.randn(self.window, self.heads * self.group, self.dim, generator=generator)
        return self.evidence(keys.to(device), queries.to(device, self.dtype)), keys.to(device)

    def evidence(
        self, keys: torch.Tensor, queries: torch.Tensor | None, quant: QuantScales | None = None
    ) -> PagedEvidence:
        """These keys in shuffled blocks; queries are those of the window."""
        used = -(-self.length // self.page)
        total = used + 3
        per_layer = 1 if self.block_major else total
        stride = LAYERS * self.heads if self.block_major else self.heads
        base = tuple(layer * per_layer * self.heads for layer in range(LAYERS))
        geometry = PageGeometry(base, stride, self.heads, self.page, self.dim)
        blocks = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed))[:used].to(keys.device)
        codec = InterleavedCodec(self.page, self.dim)
        pages = torch.full((LAYERS * total * self.heads, 2 * self.page * self.dim), math.nan, device=keys.device)
        pages = pages.to(keys.dtype)
        padded = torch.full((self.heads, used * self.page, self.dim), math.nan, device=keys.device).to(keys.dtype)
        values = padded.clone()
        padded[:, : self.length] = keys
        shape = (self.heads, used, self.page, self.dim)
        pages[geometry.pages_of(LAYER, blocks)] = codec.pack(padded.view(shape), values.view(shape))
        return PagedEvidence(
            LAYER,
            pages,
            geometry.pages_of(LAYER, blocks),
            geometry,
            codec,
            prompt_len=self.length,
            raw_queries=queries,
            scale=self.dim**-0.5,
            quant=quant or QuantScales(),
        )


def votes(evidence: PagedEvidence, **options: Any) -> torch.Tensor:
    from kvcache.kernels.window_votes import window_votes_paged

    return window_votes_paged(evidence, **{"pooling": "none", "kernel": 5, "group_reduce": "mean", **options})


def twin(evidence: PagedEvidence, keys: torch.Tensor, **options: Any) -> torch.Tensor:
    assert evidence.window_queries is not None
    options = {"pooling": "none", "kernel": 5, "group_reduce": "mean", **options}
    return window_attention(evidence.window_queries, keys, evidence.scale, **options)


def assert_like_twin(case: Case, device: torch.device, **options: Any) -> None:
    evidence, keys = case.make(device)
    found, expected = votes(evidence, **options), twin(evidence, keys, **options)
    assert found.dtype == torch.float32 and found.shape == (case.heads, case.length - case.window)
    # Both multiply the same numbers exactly and add in float32; what differs is the order.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert "pooling" in options or float(expected.sum()) > 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 24, 64])
@pytest.mark.parametrize("window", [1, 6, 32, 40])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_shapes(group: int, window: int, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """A prompt just longer than the window, and one of a few pages with a tail."""
    for length in (window + 1, window + 77):
        case = Case(length, window, 2, group, dim, dtype=dtype, block_major=length % 2 == 0, seed=length)
        assert_like_twin(case, device)


@pytest.mark.parametrize("group_reduce", ["mean", "max", "sum"])
@pytest.mark.parametrize(("pooling", "kernel"), POOLINGS)
def test_poolings_and_reductions(pooling: str, kernel: int, group_reduce: str, device: torch.device) -> None:
    """Zeros beyond both ends, also where the pooling is wider than what it pools."""
    for length in (70, 16):
        case = Case(length, seed=kernel)
        assert_like_twin(case, device, pooling=pooling, kernel=kernel, group_reduce=group_reduce)


@pytest.mark.parametrize("window", [1, 6, 32, 40, 70])
def test_the_strongest_query_of_the_window(window: int, device: torch.device) -> None:
    """Over tiles of queries, the last of them not full; no mean is as high."""
    case = Case(1300 + window, window, seed=window)
    assert_like_twin(case, device, window_reduce="max")
    assert_like_twin(case, device, window_reduce="max", pooling="max", kernel=21, group_reduce="max")
    evidence, _ = case.make(device)
    means, peaks = votes(evidence), votes(evidence, window_reduce="max")
    assert torch.equal(means, peaks) if window == 1 else bool((means < peaks).all())


@pytest.mark.parametrize("length", [512, 513, 1024, 1030, 1300, 2049])
def test_prompts_of_several_splits(length: int, device: torch.device) -> None:
    """The softmax's denominators come from parts of the keys, the last of any length; pooling goes over their seams."""
    case = Case(length, window=6, heads=1, group=3, seed=length)
    assert_like_twin(case, device)
    assert_like_twin(case, device, pooling="avg", kernel=21, group_reduce="sum")


@pytest.mark.parametrize(("programs", "splits"), [(0, 64), (2, 64), (6, 64), (264, 1), (264, 2), (264, 4)])
def test_number_of_splits_does_not_matter(
    programs: int, splits: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounded by how many programs the other dimensions leave room for, and by what the votes can add up."""
    monkeypatch.setattr("kvcache.kernels.window_votes._PROGRAMS", programs)
    monkeypatch.setattr("kvcache.kernels.window_votes._MAX_SPLITS", splits)
    assert_like_twin(Case(1600, window=6, heads=2, group=1, seed=1), device)


@pytest.mark.parametrize(
    "case",
    [
        Case(1290, window=40, heads=1, group=4, dim=24),  # two tiles of rows in the denominators
        Case(1030, window=200, heads=1, group=1),  # the window spans splits, and more than a step of queries
        Case(130, window=3, heads=5, group=8),
        Case(300, window=9, page=32),
        Case(300, window=9, page=8),
        Case(150, window=5, dim=128),
        Case(150, window=5, dim=80, group=1, heads=3),
    ],
    ids=str,
)
def test_unusual_sizes(case: Case, device: torch.device) -> None:
    assert_like_twin(case, device, pooling="max", kernel=21)


@ON_CUDA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [32_769, 70_000])
def test_long_prompts(length: int, dtype: torch.dtype, device: torch.device) -> None:
    """As many splits as there may be."""
    for case in (Case(length, 32, 8, 4, 128, dtype=dtype), Case(length, 32, 1, 1, 64, dtype=dtype)):
        assert_like_twin(case, device)
        assert_like_twin(case, device, pooling="max", kernel=21)


@pytest.mark.parametrize(("heads", "group"), [(1, 1), (2, 3), (5, 1), (3, 4)])
@pytest.mark.parametrize("length", [7, 90, 1300])
def test_probabilities_of_every_query_head(length: int, heads: int, group: int, device: torch.device) -> None:
    """Before pooling and reduction, in the order of query heads: what budgets of layers are measured on."""
    from kvcache.kernels.window_votes import window_probabilities_paged

    case = Case(length, window=6, heads=heads, group=group, seed=length)
    evidence, keys = case.make(device)
    assert evidence.window_queries is not None
    found = window_probabilities_paged(evidence)
    expected = reduced_probabilities(evidence.window_queries, keys, evidence.scale).flatten(0, 1)
    assert found.dtype == torch.float32 and found.shape == expected.shape == (heads * group, length - 6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(evidence.window_attention, expected, rtol=1e-4, atol=1e-7)
    assert float(found.sum(1).max()) <= 1 + 1e-5


@ON_CUDA
def test_window_attention_on_a_gpu_is_the_kernels(device: torch.device) -> None:
    from kvcache.kernels.window_votes import window_probabilities_paged

    evidence, _ = Case(900).make(device)
    assert torch.equal(evidence.window_attention, window_probabilities_paged(evidence))


@pytest.mark.parametrize("group_reduce", ["mean", "max", "sum"])
@pytest.mark.parametrize(("pooling", "kernel"), POOLINGS)
@pytest.mark.parametrize(("heads", "group", "n"), [(1, 1, 1), (2, 3, 5), (3, 2, 1024), (1, 4, 1025), (2, 1, 2500)])
def test_pooling_of_given_votes(
    heads: int, group: int, n: int, pooling: Pooling, kernel: int, group_reduce: GroupReduce, device: torch.device
) -> None:
    """Over the seams of blocks of 1024; zeros beyond both ends; votes stay as they are."""
    from kvcache.kernels.window_votes import pool_votes

    given = torch.rand(heads * group, n, generator=torch.Generator().manual_seed(n)).to(device)
    before = given.clone()
    found = pool_votes(given, heads, pooling=pooling, kernel=kernel, group_reduce=group_reduce)
    expected = reduce_group(pool(given, pooling, kernel).unflatten(0, (heads, group)), group_reduce, 1)
    assert found.dtype == torch.float32 and found.shape == (heads, n)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(given, before)


@pytest.mark.parametrize("group_reduce", ["mean", "max", "sum"])
@pytest.mark.parametrize("pooling", ["none", "avg", "max"])
def test_nan_among_given_votes_spreads_as_far_as_pooling(
    pooling: Pooling, group_reduce: GroupReduce, device: torch.device
) -> None:
    from kvcache.kernels.window_votes import pool_votes

    given = torch.rand(6, 40, generator=torch.Generator().manual_seed(0)).to(device)
    given[4, 20] = math.nan
    found = pool_votes(given, 2, pooling=pooling, kernel=5, group_reduce=group_reduce)
    around = [20] if pooling == "none" else [18, 19, 20, 21, 22]
    assert found[1].isnan().nonzero().flatten().tolist() == around and not found[0].isnan().any()


def test_a_layer_whose_logits_are_large(device: torch.device) -> None:
    """One key draws nearly all attention, some so little that it vanishes; nothing overflows."""
    case = Case(200, window=7)
    evidence, keys = case.make(device)
    keys[:, 40] *= 60
    evidence = case.evidence(keys, evidence.raw_queries)
    found = votes(evidence)
    assert found.isfinite().all()
    torch.testing.assert_close(found, twin(evidence, keys), rtol=1e-3, atol=1e-6)


def test_window_queries_do_not_see_their_future(device: torch.device) -> None:
    """A key inside the window that would draw all attention: only the queries from it on give theirs away."""
    case = Case(50, window=4, heads=1, group=1)
    keys = torch.zeros(1, 50, 16, dtype=torch.float16, device=device)
    keys[0, 48] = 100.0
    evidence = case.evidence(keys, torch.ones(4, 1, 16, dtype=torch.float16, device=device))
    expected = torch.full((1, 46), (1 / 47 + 1 / 48) / 4, device=device)
    torch.testing.assert_close(votes(evidence), expected)
    torch.testing.assert_close(twin(evidence, keys), expected)


@pytest.mark.parametrize("pooling", ["none", "avg", "max"])
@pytest.mark.parametrize(("group_reduce", "window_reduce"), [("mean", "mean"), ("max", "mean"), ("max", "max")])
@pytest.mark.parametrize(("length", "position"), [(90, 0), (90, 40), (90, 83), (90, 86), (90, 89), (1300, 700)])
def test_a_nan_key_makes_all_votes_of_its_head_nan(
    length: int, position: int, group_reduce: str, window_reduce: str, pooling: str, device: torch.device
) -> None:
    """Also one in the window, which the first of its queries don't see. Other heads know nothing of it."""
    case = Case(length, window=6, group=2)
    evidence, keys = case.make(device)
    keys[1, position, 3] = math.nan
    evidence = case.evidence(keys, evidence.raw_queries)
    options = {"pooling": pooling, "group_reduce": group_reduce, "window_reduce": window_reduce}
    found, expected = votes(evidence, **options), twin(evidence, keys, **options)
    assert found[1].isnan().all() and expected[1].isnan().all()
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("window_reduce", ["mean", "max"])
@pytest.mark.parametrize("group_reduce", ["mean", "max", "sum"])
def test_a_nan_query_spoils_its_own_kv_head_alone(group_reduce: str, window_reduce: str, device: torch.device) -> None:
    case = Case(90)
    evidence, keys = case.make(device)
    assert evidence.raw_queries is not None
    evidence.raw_queries[2, 4, 5] = math.nan  # of three query heads a KV head, number 4 is the second's
    options = {"group_reduce": group_reduce, "window_reduce": window_reduce}
    found, expected = votes(evidence, **options), twin(evidence, keys, **options)
    assert found[1].isnan().all() and expected[1].isnan().all()
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-7)


def test_errors(device: torch.device) -> None:
    case = Case(30)
    evidence, keys = case.make(device)
    with pytest.raises(ValueError, match="last queries are needed and were not kept"):
        votes(case.evidence(keys, None))
    evidence.codec = PermutedCodec.plain(16, 16)
    with pytest.raises(ValueError, match="read an InterleavedCodec's pages, not PermutedCodec's"):
        votes(evidence)


@ON_CUDA
@pytest.mark.parametrize("length", [40, 900, 5000])
def test_votes_on_a_gpu_are_the_kernels(length: int, device: torch.device) -> None:
    """Bit by bit, with the defaults too; groups reduced before the softmax are torch's work."""
    case = Case(length)
    evidence, keys = case.make(device)
    ours: dict[str, Any] = {"pooling": "max", "kernel": 21, "group_reduce": "max", "window_reduce": "max"}
    for options in ({"pooling": "avg", "kernel": 5}, {**ours, "window_reduce": "mean"}, ours):
        assert torch.equal(window_votes(evidence, **options), votes(evidence, **options))
    assert torch.equal(window_votes(evidence), votes(evidence, pooling="avg"))
    by_torch = twin(evidence, keys, group_stage="logits")
    assert torch.equal(window_votes(evidence, pooling="none", group_stage="logits"), by_torch)


@ON_CUDA
@pytest.mark.parametrize("as_bytes", [True, False], ids=["bytes", "fp8"])
@pytest.mark.parametrize("quant", [QuantScales(), QuantScales(0.5, 0.25, 4.0), QuantScales(0.37, 1.21)], ids=str)
@pytest.mark.parametrize("fp8_queries", [False, True])
@pytest.mark.parametrize("case", [Case(600, 32, dim=64), Case(1300, 6, dim=24, group=4)], ids=str)
def test_fp8_caches(case: Case, fp8_queries: bool, quant: QuantScales, as_bytes: bool, device: torch.device) -> None:
    """vLLM keeps such a cache as bytes. Its queries come as fp8 too, or in the model's dtype."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(case.heads, case.length, case.dim, generator=generator).to(torch.float8_e4m3fn)
    queries = 2 * torch.randn(case.window, case.heads * case.group, case.dim, generator=generator)
    raw = queries.to(torch.float8_e4m3fn if fp8_queries else torch.bfloat16).to(device)
    if not fp8_queries:
        quant = replace(quant, query=1.0)
    # Written as bytes, since torch can't scatter fp8: NaN is 0x7F.
    evidence = case.evidence(torch.zeros(keys.shape, dtype=torch.float16, device=device), raw, quant)
    evidence.pages = torch.full(evidence.pages.shape, 0x7F, dtype=torch.uint8, device=device)
    used = evidence.page_table.shape[1]
    content = torch.full((case.heads, used * case.page, 2 * case.dim), 0x7F, dtype=torch.uint8, device=device)
    content[:, : case.length, : case.dim] = keys.view(torch.uint8).to(device)
    evidence.pages[evidence.page_table] = content.view(case.heads, used, -1)
    if not as_bytes:
        evidence.pages = evidence.pages.view(torch.float8_e4m3fn)
    real = dequantise(keys.view(torch.uint8).to(device), quant.key)
    for options in ({}, {"pooling": "max", "kernel": 21, "group_reduce": "max"}):
        torch.testing.assert_close(votes(evidence, **options), twin(evidence, real, **options), rtol=1e-4, atol=1e-7)


@ON_CUDA
def test_pages_behind_two_to_the_31_elements(device: torch.device) -> None:
    if torch.cuda.mem_get_info()[0] < 3 * 2**31:
        pytest.skip("needs 6 GB of free GPU memory")
    case = Case(700, dim=64)
    evidence, keys = case.make(device)
    near = evidence.pages
    first = 2**31 // near.shape[1] + 10
    evidence.pages = torch.empty(first + len(near), near.shape[1], dtype=near.dtype, device=device)
    evidence.pages[first:] = near
    evidence.page_table = evidence.page_table + first
    torch.testing.assert_close(votes(evidence), twin(evidence, keys), rtol=1e-4, atol=1e-7)
