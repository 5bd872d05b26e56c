"""What selectors are made of: kernels against their naive twins, on batches of every kind of row."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from attention_plugins import naive
from attention_plugins.decode.rows import Mode
from kvcache.evidence import QuantScales
from kvcache.pages import PermutedCodec
from tests.kernels.selector_batch import EVERY, Batch, Row

pytest.importorskip("triton")
# The interpreter's numpy warns of infinities and NaNs, which belong to these numbers.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CUDA = torch.cuda.is_available()
UNTOUCHED = -7
SELECT, REUSE, DENSE = Mode.SELECT, Mode.REUSE, Mode.DENSE
# Triton's interpreter multiplies bfloat16 wrongly; on a GPU float32 would be multiplied as TF32, and no cache has it.
DTYPES = [torch.bfloat16, torch.float16, torch.uint8] if CUDA else [torch.float32, torch.float16]
QUANT = QuantScales(0.5, 0.25, 4.0)
SHAPES = [
    {"group": 1, "dim": 64, "heads": 1},
    {"group": 3, "dim": 16, "page": 8},
    {"group": 4, "dim": 128, "heads": 3},
    {"group": 8, "dim": 80},
]


@pytest.fixture
def kernels() -> ModuleType:
    from attention_plugins import kernels

    return kernels


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=SHAPES, ids=lambda shape: "-".join(f"{name}{value}" for name, value in shape.items()))
def batch(request: pytest.FixtureRequest, dtype: torch.dtype, device: torch.device) -> Batch:
    quant = QUANT if dtype == torch.uint8 else QuantScales()
    return Batch(dtype=dtype, device=device, quant=quant, **request.param)


@pytest.fixture
def small(device: torch.device) -> Batch:
    """For what doesn't multiply."""
    return Batch(dtype=torch.float16, device=device)


def both(
    kernels: ModuleType, name: str, outputs: list[torch.Tensor], run: Callable[[Callable[..., Any], list[Any]], None]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a kernel and its twin make of copies of the same outputs."""
    found, expected = ([tensor.clone() for tensor in outputs] for _ in range(2))
    run(getattr(kernels, name), found)
    run(getattr(naive, name), expected)
    return found, expected


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.tolist() == other.tolist()


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Both multiply the same numbers exactly and add in float32; what differs is the order."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def line(batch: Batch, *more: int) -> torch.Tensor:
    return batch.filled(UNTOUCHED, len(batch.given), batch.heads, *more)


@pytest.mark.parametrize("want", [DENSE | REUSE, SELECT, 0])
def test_full_rows(small: Batch, kernels: ModuleType, want: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_plugins.kernels.page_rows._COLUMNS", 16)
    outputs = [small.filled(UNTOUCHED, len(small.given) * 2, 40)[:, :39], small.filled(UNTOUCHED, len(small.given) * 2)]
    assert_same(
        *both(kernels, "full_rows", outputs, lambda full_rows, out: full_rows(*out, small.rows, small.cache, want))
    )


def test_newest_slots(small: Batch, kernels: ModuleType) -> None:
    found = kernels.newest_slots(small.rows, small.cache)
    assert found.dtype == torch.int64
    assert_same([found], [naive.newest_slots(small.rows, small.cache)])


def scores_by(batch: Batch, kernels: ModuleType, queries: torch.Tensor, **options: Any) -> None:
    outputs = [batch.filled(UNTOUCHED, batch.heads, batch.columns + 3, dtype=torch.float32)]
    found, expected = both(
        kernels,
        "token_scores",
        outputs,
        lambda token_scores, out: token_scores(*out, batch.rows, batch.cache, queries, SELECT, **options),
    )
    assert_close(found, expected)


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("with_lse", [False, True])
def test_token_scores(batch: Batch, kernels: ModuleType, with_lse: bool, reduce: str) -> None:
    lse = torch.randn(len(batch.given), batch.heads, batch.group, generator=batch.generator).to(batch.device)
    scores_by(batch, kernels, batch.queries(), lse=lse if with_lse else None, reduce=reduce)


@pytest.mark.parametrize("tokens", [16, 32])
def test_token_scores_of_several_chunks(
    small: Batch, kernels: ModuleType, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some programs have one chunk more than others."""
    monkeypatch.setattr("attention_plugins.kernels.scores._TOKENS", tokens)
    monkeypatch.setattr("attention_plugins.kernels.scores.programs_each", lambda *_: 2)
    scores_by(small, kernels, small.queries())


@pytest.mark.parametrize("width", [8, 32])
def test_scores_of_labels(small: Batch, kernels: ModuleType, width: int) -> None:
    shape = len(small.cache.pages) * small.page, width
    labels = torch.randn(shape, generator=small.generator).to(small.device, torch.float16)
    scores_by(small, kernels, small.queries(width), labels=labels)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_what_is_not_a_number_scores_infinity(small: Batch, kernels: ModuleType, reduce: str) -> None:
    slot = small.slots[0][1][3:4]
    broken = torch.full((1, small.dim), math.nan, dtype=torch.float16, device=small.device)
    small.cache.codec.write_tokens(small.cache.pages, slot, broken, broken)
    queries = small.queries()
    queries[8, 0, 2] = math.nan
    scores_by(small, kernels, queries, reduce=reduce)


@pytest.fixture(params=["registers", "chunks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "chunks":
        monkeypatch.setattr("attention_plugins.kernels.top._IN_REGISTERS", 0)
        monkeypatch.setattr("attention_plugins.kernels.top._CHUNK", 32)
    return request.param


def hard_scores(batch: Batch, columns: int, kind: str) -> torch.Tensor:
    scores = batch.scores(columns, ties=kind == "ties")
    if kind == "odd":
        scores[:, ::3] = math.nan
        scores[:, 1::5] = math.inf
        scores[:, 2::7] = -math.inf
        scores[:, 4::9] = 0.0
        scores[:, 6::9] = -0.0
    return scores.fill_(0.0) if kind == "equal" else scores


@pytest.mark.parametrize(
    ("kind", "as_places", "width"),
    [("random", False, 70), ("ties", True, 70), ("ties", False, 12), ("odd", True, 70), ("equal", False, 70)],
)
def test_top_slots(small: Batch, kernels: ModuleType, way: str, as_places: bool, kind: str, width: int) -> None:
    scores, n = hard_scores(small, small.columns, kind), len(small.given)
    into = torch.arange(n - 1, -1, -1, dtype=torch.int32, device=small.device)
    into[4] = -1
    outputs = [line(small, width), line(small)]
    assert_same(
        *both(
            kernels,
            "top_slots",
            outputs,
            lambda top, out: top(*out, scores, small.rows, small.cache, SELECT, into, as_places=as_places),
        )
    )


@pytest.mark.parametrize("tokens", [1, 2, 3, 36, 37, 38])
def test_any_budget(kernels: ModuleType, way: str, tokens: int, device: torch.device) -> None:
    batch = Batch([Row(37, tokens=tokens)], dtype=torch.float16, device=device)
    scores = batch.scores(ties=True)
    outputs, into = [line(batch, 40), line(batch)], batch.filled(0, 1)
    found = both(
        kernels, "top_slots", outputs, lambda top, out: top(*out, scores, batch.rows, batch.cache, SELECT, into)
    )
    assert_same(*found)
    pages = [batch.filled(UNTOUCHED, 2, 12), batch.filled(UNTOUCHED, 2)]
    assert_same(*both(kernels, "top_pages", pages, lambda top, out: top(*out, scores, batch.rows, batch.cache, SELECT)))


@pytest.mark.parametrize(
    ("want", "kind"), [(SELECT, "random"), (SELECT | REUSE, "ties"), (EVERY, "odd"), (SELECT, "equal"), (0, "random")]
)
def test_top_pages(small: Batch, kernels: ModuleType, way: str, want: int, kind: str) -> None:
    scores = hard_scores(small, small.columns // small.page, kind)
    outputs = [small.filled(UNTOUCHED, len(small.given) * 2, 60), small.filled(UNTOUCHED, len(small.given) * 2)]
    assert_same(*both(kernels, "top_pages", outputs, lambda top, out: top(*out, scores, small.rows, small.cache, want)))


@pytest.mark.parametrize("lists", [1, 2])
def test_place_slots(small: Batch, kernels: ModuleType, lists: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_plugins.kernels.places._PLACES", 8)
    n = len(small.given)
    places = torch.randint(0, 40, (n, lists, 20), dtype=torch.int32, generator=small.generator).to(small.device)
    counts = torch.randint(0, 21, (n, lists), dtype=torch.int32, generator=small.generator).to(small.device)
    want = REUSE | SELECT
    assert_same(
        *both(
            kernels,
            "place_slots",
            [line(small, 20)],
            lambda place_slots, out: place_slots(*out, places, counts, small.rows, small.cache, want),
        )
    )


def lists_of(batch: Batch, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lists of different lengths for all rows, one empty, one not to be looked at: slots, counts, into."""
    n = len(batch.given)
    into = torch.randperm(n, generator=batch.generator).int()
    slots, counts = torch.zeros(n, batch.heads, width, dtype=torch.int32), torch.zeros(n, batch.heads).int()
    for row in batch.wanted(EVERY):
        for head in range(batch.heads):
            have = batch.slots[row][head].cpu()
            places = torch.randint(0, len(have), (1 + (7 * row + 5 * head) % width,), generator=batch.generator)
            slots[into[row], head, : len(places)] = have[places].int()
            counts[into[row], head] = len(places)
    counts[into[2], 0] = 0
    into[8] = -1
    return slots.to(batch.device), counts.to(batch.device), into.to(batch.device)


def assert_attends(batch: Batch, kernels: ModuleType, queries: torch.Tensor, width: int, with_logits: bool) -> None:
    lists = lists_of(batch, width)
    dtype = batch.queries().dtype
    wide = torch.full((len(queries), 2, *queries.shape[1:]), float(UNTOUCHED), dtype=dtype, device=batch.device)
    logits = [line(batch, width).float()] if with_logits else []

    def run(attend: Callable[..., None], out: list[torch.Tensor]) -> None:
        attend(out[0][:, 0], queries, *lists, batch.rows, batch.cache, SELECT | REUSE, *out[1:])

    found, expected = both(kernels, "slot_attention", [wide, *logits], run)
    # The powers are rounded to the values' dtype before they are multiplied, as in any such kernel.
    tolerance = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    tolerance *= batch.quant.value
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    assert_close(found[1:], expected[1:])


@pytest.mark.parametrize("with_logits", [False, True])
def test_slot_attention(batch: Batch, kernels: ModuleType, with_logits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_plugins.kernels.attention._TOKENS", 16)
    assert_attends(batch, kernels, batch.queries(), 50, with_logits)


@pytest.mark.parametrize("splits", [1, 2, 3, 64])
def test_number_of_splits_does_not_matter(
    small: Batch, kernels: ModuleType, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"_TOKENS": 16, "_LOGITS": 32, "_MAX_SPLITS": splits, "_PROGRAMS": 10**6}.items():
        monkeypatch.setattr(f"attention_plugins.kernels.attention.{name}", value)
    assert_attends(small, kernels, small.queries(), 70, with_logits=True)


def test_queries_with_gaps(small: Batch, kernels: ModuleType) -> None:
    """As they lie beside keys and values in what a model's projection gives."""
    queries = small.queries()
    wide = torch.full((len(queries), 3, *queries.shape[1:]), math.nan, dtype=queries.dtype, device=small.device)
    wide[:, 1] = queries
    assert_attends(small, kernels, wide[:, 1], 20, with_logits=True)
    scores_by(small, kernels, wide[:, 1])


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_fp8_queries(kernels: ModuleType, device: torch.device) -> None:
    batch = Batch(dtype=torch.uint8, device=device, quant=QUANT, dim=64)
    queries = batch.queries(fp8=True)
    assert_attends(batch, kernels, queries, 30, with_logits=True)
    scores_by(batch, kernels, queries)


def written_bounds(batch: Batch) -> torch.Tensor:
    bounds = naive.page_bounds(batch.cache.pages, batch.geometry)
    naive.write_bounds(bounds, batch.cache, *batch.all_pages())
    return bounds


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_page_scores(batch: Batch, kernels: ModuleType, reduce: str) -> None:
    bounds, queries = written_bounds(batch), batch.queries()
    outputs = [batch.filled(UNTOUCHED, batch.heads, batch.columns // batch.page + 3, dtype=torch.float32)]
    found, expected = both(
        kernels,
        "page_scores",
        outputs,
        lambda page_scores, out: page_scores(*out, bounds, batch.rows, batch.cache, queries, SELECT, reduce),
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_page_scores_of_several_chunks(small: Batch, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_plugins.kernels.quest._PAGES", 16)
    monkeypatch.setattr("attention_plugins.kernels.quest.programs_each", lambda *_: 1)
    test_page_scores(small, kernels, "sum")


@pytest.mark.parametrize("want", [DENSE, EVERY])
def test_bounds_grow(batch: Batch, kernels: ModuleType, want: int) -> None:
    """The newest tokens are let into pages' bounds that don't have them yet."""
    bounds = torch.zeros_like(written_bounds(batch))
    pages, filled = batch.all_pages()
    newest = naive.newest_slots(batch.rows, batch.cache)[batch.rows.modes != 0].flatten()
    filled[torch.searchsorted(pages, newest // batch.page)] -= 1
    naive.write_bounds(bounds, batch.cache, pages, filled)
    found, expected = both(
        kernels, "grow_bounds", [bounds], lambda grow, out: grow(*out, batch.rows, batch.cache, want)
    )
    assert torch.equal(found[0], expected[0])
    if want == EVERY:
        assert torch.equal(found[0], written_bounds(batch))


def test_append_and_evict(small: Batch, kernels: ModuleType) -> None:
    """Round after round, at random; lists that are full, and such that have room beyond what is to stay."""
    slots, counts, into = lists_of(small, 20)
    assert counts.max() == 20
    for seed in range(4):
        logits = torch.randn(len(small.given), 2, 20, generator=torch.Generator().manual_seed(seed))
        logits = ((logits * 2).round() / 2).to(small.device)
        logits[0, 0, 2] = math.nan
        found = [slots.clone(), counts.clone()]
        for ops, lists in ((kernels, found), (naive, [slots, counts])):
            ops.append_newest(*lists, into, small.rows, small.cache, SELECT | REUSE)
        assert_same(found, [slots, counts])
        for ops, lists in ((kernels, found), (naive, [slots, counts])):
            ops.evict_least(*lists, into, small.rows, logits, SELECT | REUSE)
        assert_same(found, [slots, counts])


def test_another_layout_is_an_error(small: Batch, kernels: ModuleType) -> None:
    cache = replace(small.cache, codec=PermutedCodec.plain(small.page, small.dim))
    with pytest.raises(ValueError, match="read an InterleavedCodec's pages, not PermutedCodec's"):
        kernels.token_scores(small.scores(), small.rows, cache, small.queries(), SELECT)


def test_the_same_names(kernels: ModuleType) -> None:
    assert kernels.__all__ == naive.__all__
