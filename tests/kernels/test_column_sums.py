"""Column sums by kernels that read pages, against the naive twin on the same numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from kvcache.evidence import PagedEvidence, QuantScales, dequantise
from kvcache.observers.column_sums import ColumnSums
from kvcache.pages import InterleavedCodec, PageGeometry, PermutedCodec
from kvcache.scorers import column_sums

pytest.importorskip("triton")
# The interpreter's numpy warns of infinities and NaNs, which belong to these sums.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CUDA = torch.cuda.is_available()
ON_CUDA = pytest.mark.skipif(not CUDA, reason="needs a GPU")
# Triton's interpreter multiplies bfloat16 wrongly; float32 on a GPU is what `tests/kvcache --device cuda` has.
DTYPES = [torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]
LAYER, LAYERS = 1, 3


@dataclass(frozen=True)
class Case:
    """One layer of a prompt whose last `chunk` queries arrive; all but the layer's own pages is NaN."""

    length: int
    chunk: int
    heads: int = 2
    group: int = 3
    dim: int = 16
    page: int = 16
    dtype: torch.dtype = torch.float16
    behind: int = 0
    """Tokens behind the chunk whose keys lie in the pages too."""

    def make(self, device: torch.device) -> tuple[PagedEvidence, torch.Tensor, torch.Tensor]:
        """Evidence in pages, its keys [heads, length + behind, dim], and the chunk's queries."""
        generator = torch.Generator().manual_seed(self.length)
        keys = torch.randn(self.heads, self.length + self.behind, self.dim, generator=generator)
        queries = 2 * torch.randn(self.chunk, self.heads * self.group, self.dim, generator=generator)
        keys, queries = keys.to(device, self.dtype), queries.to(device, self.dtype)
        return self.evidence(keys), keys, queries

    def evidence(self, keys: torch.Tensor, quant: QuantScales | None = None) -> PagedEvidence:
        """These keys in shuffled blocks; fp8 ones as bytes, in which torch can write."""
        used, count = -(-keys.shape[1] // self.page), keys.shape[1]
        total = used + 3
        geometry = PageGeometry(
            tuple(layer * self.heads for layer in range(LAYERS)), LAYERS * self.heads, self.heads, self.page, self.dim
        )
        blocks = torch.randperm(total, generator=torch.Generator().manual_seed(count))[:used].to(keys.device)
        unwritten = 0x7F if keys.element_size() == 1 else math.nan  # NaN, in fp8 too
        pages = torch.full(
            (LAYERS * total * self.heads, 2 * self.page * self.dim), unwritten, dtype=keys.dtype, device=keys.device
        )
        content = pages.new_full((self.heads, used * self.page, 2 * self.dim), unwritten)
        content[:, :count, : self.dim] = keys
        pages[geometry.pages_of(LAYER, blocks)] = content.view(self.heads, used, -1)
        return PagedEvidence(
            LAYER,
            pages,
            geometry.pages_of(LAYER, blocks),
            geometry,
            InterleavedCodec(self.page, self.dim),
            prompt_len=count,
            raw_queries=None,
            scale=self.dim**-0.5,
            quant=quant or QuantScales(),
        )


def paged(evidence: PagedEvidence, queries: torch.Tensor, first: int) -> torch.Tensor:
    from kvcache.kernels.column_sums import column_sums_paged

    return column_sums_paged(evidence, queries, first)


def assert_like_twin(case: Case, device: torch.device) -> None:
    evidence, keys, queries = case.make(device)
    first = case.length - case.chunk
    found, expected = paged(evidence, queries, first), column_sums(queries, keys, evidence.scale, first)
    assert found.dtype == torch.float32 and found.shape == (case.heads, case.length)
    # Both multiply the same numbers exactly and add in float32; what differs is the order.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(1), torch.full((case.heads,), float(case.chunk), device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("chunk", [1, 2, 16, 77])
def test_chunks(chunk: int, group: int, dtype: torch.dtype, device: torch.device) -> None:
    """A whole prompt, and the end of one with a tail."""
    assert_like_twin(Case(chunk, chunk, group=group, dtype=dtype), device)
    assert_like_twin(Case(chunk + 130, chunk, group=group, dtype=dtype), device)


@pytest.mark.parametrize("page", [16, 32])
@pytest.mark.parametrize("dim", [8, 64, 80, 128])
def test_pages_and_head_sizes(dim: int, page: int, device: torch.device) -> None:
    assert_like_twin(Case(150, 70, dim=dim, page=page), device)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128, 129, 300])
def test_whole_prompts_of_any_length(length: int, device: torch.device) -> None:
    assert_like_twin(Case(length, length, heads=1, group=2), device)


@pytest.mark.parametrize("chunk", [1, 6, 60])
@pytest.mark.parametrize("length", [512, 513, 1300])
def test_keys_in_several_splits(length: int, chunk: int, device: torch.device) -> None:
    """Denominators come from parts of the keys, the last of any length; a chunk spans splits that it partly sees."""
    assert_like_twin(Case(length, chunk, heads=1), device)


@pytest.mark.parametrize("programs", [1, 8])
def test_number_of_splits_does_not_matter(programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcache.kernels.window_votes._PROGRAMS", programs)
    assert_like_twin(Case(1600, 40, heads=1, group=1), device)


def test_keys_behind_the_chunk_are_not_looked_at(device: torch.device) -> None:
    assert_like_twin(Case(100, 30, behind=50), device)


def test_queries_of_a_batch_with_gaps(device: torch.device) -> None:
    """A view of queries, keys and values together, as models may make it."""
    case = Case(90, 40)
    evidence, keys, queries = case.make(device)
    wide = torch.full((40, 9, 16), math.nan, dtype=queries.dtype, device=device)
    wide[:, :6] = queries
    torch.testing.assert_close(
        paged(evidence, wide[:, :6], 50), column_sums(queries, keys, evidence.scale, 50), rtol=1e-4, atol=1e-6
    )


def test_large_logits_do_not_overflow(device: torch.device) -> None:
    case = Case(200, 120)
    _, keys, queries = case.make(device)
    keys[:, 40] *= 60
    evidence = case.evidence(keys)
    found = paged(evidence, queries, 80)
    assert found.isfinite().all()
    torch.testing.assert_close(found, column_sums(queries, keys, evidence.scale, 80), rtol=1e-3, atol=1e-5)


def test_a_nan_key_spoils_its_own_kv_head_alone(device: torch.device) -> None:
    case = Case(150, 60)
    _, keys, queries = case.make(device)
    keys[1, 100, 3] = math.nan
    evidence = case.evidence(keys)
    found, expected = paged(evidence, queries, 90), column_sums(queries, keys, evidence.scale, 90)
    assert found[1].isnan().all() and expected[1].isnan().all()
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-6)


def test_another_layout_is_an_error(device: torch.device) -> None:
    evidence, _, queries = Case(30, 5).make(device)
    evidence.codec = PermutedCodec.plain(16, 16)
    with pytest.raises(ValueError, match="read an InterleavedCodec's pages, not PermutedCodec's"):
        paged(evidence, queries, 25)


@ON_CUDA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "chunk"), [(8192, 8192), (20_000, 2048), (70_000, 1), (70_000, 300)])
def test_long_prompts(length: int, chunk: int, dtype: torch.dtype, device: torch.device) -> None:
    for case in (Case(length, chunk, 8, 4, 128, dtype=dtype), Case(length, chunk, 1, 1, 256, dtype=dtype)):
        assert_like_twin(case, device)


@ON_CUDA
def test_the_observer_takes_the_kernels(device: torch.device) -> None:
    """Bit by bit the same each time."""
    evidence, _, queries = Case(900, 900).make(device)
    observer = ColumnSums(LAYERS, 900)
    observer.record(LAYER, 0, queries, lambda: evidence)
    assert torch.equal(observer.found(LAYER), paged(evidence, queries, 0))


@ON_CUDA
@pytest.mark.parametrize("as_bytes", [True, False], ids=["bytes", "fp8"])
@pytest.mark.parametrize("quant", [QuantScales(), QuantScales(0.5, 0.25, 4.0), QuantScales(0.37, 1.21)], ids=str)
@pytest.mark.parametrize("fp8_queries", [False, True])
def test_fp8_caches(fp8_queries: bool, quant: QuantScales, as_bytes: bool, device: torch.device) -> None:
    """vLLM keeps such a cache as bytes. Its queries come as fp8 too, or in the model's dtype."""
    case, generator = Case(600, 100, dim=64), torch.Generator().manual_seed(0)
    stored = torch.randn(2, 600, 64, generator=generator).to(torch.float8_e4m3fn).view(torch.uint8).to(device)
    raw = 2 * torch.randn(100, 6, 64, generator=generator)
    raw = raw.to(torch.float8_e4m3fn if fp8_queries else torch.bfloat16).to(device)
    if not fp8_queries:
        quant = replace(quant, query=1.0)
    evidence = case.evidence(stored, quant)
    if not as_bytes:
        evidence.pages = evidence.pages.view(torch.float8_e4m3fn)
    expected = column_sums(dequantise(raw, quant.query), dequantise(stored, quant.key), evidence.scale, 500)
    torch.testing.assert_close(paged(evidence, raw, 500), expected, rtol=1e-4, atol=1e-6)


@ON_CUDA
def test_new_sizes_wait_for_no_compiler(device: torch.device) -> None:
    from kvcache.kernels import column_sums as kernels
    from kvcache.kernels import window_votes

    evidence, _, queries = Case(700, 700).make(device)
    paged(evidence, queries[:8], 0)

    def compiled() -> int:
        caches = (kernels._sums.device_caches, window_votes._denominators.device_caches)
        return sum(len(cache[0]) for kernel in caches for cache in kernel.values())

    before = compiled()
    for chunk, first in [(1, 0), (1, 16), (16, 16), (17, 31), (64, 0), (333, 10), (690, 10)]:
        paged(evidence, queries[:chunk], first)
    assert compiled() == before
