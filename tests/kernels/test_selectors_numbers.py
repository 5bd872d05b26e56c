"""Kernels that read keys and values for selectors, against their naive twins, on batches of every kind of row."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from attention_plugins import naive
from attention_plugins.decode.rows import DecodeRows, Mode
from kvcache.evidence import QuantScales
from kvcache.pages import PermutedCodec
from tests.kernels.selector_batch import EVERY, UNTOUCHED, Batch, assert_close, both

pytest.importorskip("triton")
# The interpreter's numpy warns of infinities and NaNs, which belong to these numbers.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CUDA = torch.cuda.is_available()
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


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=SHAPES, ids=lambda shape: "-".join(f"{name}{value}" for name, value in shape.items()))
def batch(request: pytest.FixtureRequest, dtype: torch.dtype, device: torch.device) -> Batch:
    quant = QUANT if dtype == torch.uint8 else QuantScales()
    return Batch(dtype=dtype, device=device, quant=quant, **request.param)


@pytest.fixture
def small(device: torch.device) -> Batch:
    return Batch(dtype=torch.float16, device=device)


def assert_scores(batch: Batch, queries: torch.Tensor, **options: Any) -> None:
    outputs = [batch.filled(UNTOUCHED, batch.heads, batch.columns + 3, dtype=torch.float32)]
    assert_close("token_scores", outputs, batch.rows, batch.cache, queries, SELECT, **options)


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("with_lse", [False, True])
def test_token_scores(batch: Batch, with_lse: bool, reduce: str) -> None:
    lse = torch.randn(len(batch.given), batch.heads, batch.group, generator=batch.generator).to(batch.device)
    assert_scores(batch, batch.queries(), lse=lse if with_lse else None, reduce=reduce)


@pytest.mark.parametrize("tokens", [16, 32])
def test_token_scores_of_several_chunks(small: Batch, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some programs have one chunk more than others."""
    monkeypatch.setattr("attention_plugins.kernels.scores._TOKENS", tokens)
    monkeypatch.setattr("attention_plugins.kernels.scores.programs_each", lambda *_: 2)
    assert_scores(small, small.queries())


@pytest.mark.parametrize("width", [8, 32])
def test_scores_of_labels(small: Batch, width: int) -> None:
    shape = len(small.cache.pages) * small.page, width
    labels = torch.randn(shape, generator=small.generator).to(small.device, torch.float16)
    assert_scores(small, small.queries(width), labels=labels)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_what_is_not_a_number_scores_infinity(small: Batch, reduce: str) -> None:
    slot = small.slots[0][1][3:4]
    broken = torch.full((1, small.dim), math.nan, dtype=torch.float16, device=small.device)
    small.cache.codec.write_tokens(small.cache.pages, slot, broken, broken)
    queries = small.queries()
    queries[8, 0, 2] = math.nan
    assert_scores(small, queries, reduce=reduce)


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


def assert_attends(batch: Batch, queries: torch.Tensor, width: int, with_logits: bool) -> None:
    lists = lists_of(batch, width)
    out = torch.full(queries.shape, float(UNTOUCHED), dtype=batch.queries().dtype, device=batch.device)
    logits = batch.lists(width).float() if with_logits else None
    results = []
    for outputs in both("slot_attention", [out], queries, *lists, batch.rows, batch.cache, SELECT | REUSE):
        results += outputs
    # The powers are rounded to the values' dtype before they are multiplied, as in any such kernel.
    tolerance = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}[out.dtype] * batch.quant.value
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
    if logits is not None:
        from attention_plugins import kernels

        expected, again = logits.clone(), torch.empty_like(out).copy_(out)
        naive.slot_attention(out, queries, *lists, batch.rows, batch.cache, SELECT | REUSE, expected)
        kernels.slot_attention(again, queries, *lists, batch.rows, batch.cache, SELECT | REUSE, logits)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(again, results[0])


@pytest.mark.parametrize("with_logits", [False, True])
def test_slot_attention(batch: Batch, with_logits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_plugins.kernels.attention._TOKENS", 16)
    assert_attends(batch, batch.queries(), 50, with_logits)


def test_page_attention(batch: Batch) -> None:
    queries, n = batch.queries(), len(batch.rows) * batch.cache.geometry.num_kv_heads
    pages = torch.zeros(n, max(1, batch.columns), dtype=torch.int32, device=batch.device)
    lengths = torch.zeros(n, dtype=torch.int32, device=batch.device)
    naive.full_rows(pages, lengths, batch.rows, batch.cache, SELECT | REUSE)
    out, most = (
        torch.full(queries.shape, float(UNTOUCHED), dtype=queries.dtype, device=batch.device),
        int(lengths.max()),
    )
    given = queries, pages, lengths, batch.rows, batch.cache, SELECT | REUSE, most
    results = [outputs[0] for outputs in both("page_attention", [out], *given)]
    tolerance = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}[out.dtype] * batch.quant.value
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
    assert (results[0] != UNTOUCHED).any(), "no row was attended"


def test_pool_scores(batch: Batch) -> None:
    scores, pooled = batch.scores(), torch.full_like(batch.scores(), float(UNTOUCHED))
    results = [outputs[0] for outputs in both("pool_scores", [pooled], scores, batch.rows, batch.cache, SELECT | REUSE)]
    assert torch.equal(*results)
    assert (results[0] != UNTOUCHED).any() and not torch.equal(results[0], scores)


@pytest.mark.parametrize("splits", [1, 2, 3, 64])
def test_number_of_splits_does_not_matter(small: Batch, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_TOKENS": 16, "_LOGITS": 32, "_MAX_SPLITS": splits, "_PROGRAMS": 10**6}.items():
        monkeypatch.setattr(f"attention_plugins.kernels.attention.{name}", value)
    assert_attends(small, small.queries(), 70, with_logits=True)


def test_queries_and_results_with_gaps(small: Batch) -> None:
    """As they lie beside keys and values in what a model's projection gives."""
    from attention_plugins import kernels

    queries = small.queries()
    wide = torch.full((len(queries), 3, *queries.shape[1:]), math.nan, dtype=queries.dtype, device=small.device)
    wide[:, 1] = queries
    assert_attends(small, wide[:, 1], 20, with_logits=True)
    assert_scores(small, wide[:, 1])
    lists, out, expected = lists_of(small, 20), torch.zeros_like(wide), torch.zeros_like(queries)
    for into, q in ((out[:, 2], wide[:, 1]), (expected, queries)):
        kernels.slot_attention(into, q, *lists, small.rows, small.cache, SELECT)
    assert torch.equal(out[:, 2], expected) and not out[:, :2].any()
    with pytest.raises(ValueError, match="a row of `out` must have no gaps"):
        kernels.slot_attention(out[:, 2].transpose(1, 2), queries, *lists, small.rows, small.cache, SELECT)


@pytest.mark.parametrize("invariant", [True, False])
def test_a_row_alone_has_the_same_bits(small: Batch, invariant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where asked for: sums are cut in parts, of which a row gets more when it is alone."""
    from attention_plugins import kernels

    for name, value in {"_TOKENS": 16, "_PROGRAMS": 2 * len(small.rows) * small.heads}.items():
        monkeypatch.setattr(f"attention_plugins.kernels.attention.{name}", value)
    cache, queries = replace(small.cache, invariant=invariant), small.queries()
    slots, counts, into = lists_of(small, 70)
    row = max(small.wanted(SELECT), key=lambda row: int(counts[into[row]].min()))
    beside, alone, own = torch.zeros_like(queries), torch.zeros_like(queries[:1]), slice(row, row + 1)
    kernels.slot_attention(beside, queries, slots, counts, into, small.rows, cache, SELECT)
    tensors = {one.name: getattr(small.rows, one.name) for one in fields(small.rows) if one.name != "tables"}
    first = replace(small.rows, **{name: tensor[own] for name, tensor in tensors.items()})
    kernels.slot_attention(alone, queries[own], slots, counts, into[own], first, cache, SELECT)
    assert alone.any() and torch.equal(alone[0], beside[row]) == invariant


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_fp8_queries(device: torch.device) -> None:
    batch = Batch(dtype=torch.uint8, device=device, quant=QUANT, dim=64)
    queries = batch.queries(fp8=True)
    assert_attends(batch, queries, 30, with_logits=True)
    assert_scores(batch, queries)


def written_bounds(batch: Batch) -> torch.Tensor:
    bounds = naive.page_bounds(len(batch.cache.pages), batch.dim, batch.device)
    naive.write_bounds(bounds, batch.cache, *batch.all_pages())
    return bounds


def spread(batch: Batch) -> DecodeRows:
    """Every row with a spread of its own, the first with the paper's."""
    spreads = torch.rand(len(batch.given), generator=batch.generator).to(batch.device)
    spreads[0] = 1.0
    return replace(batch.rows, thresholds=spreads)


def some_pins(batch: Batch) -> torch.Tensor:
    """A third of all pages of two states more than there are rows."""
    most = -(-int(batch.columns) // batch.page // 8) + 1
    bits = torch.rand(len(batch.given) + 2, batch.heads, most, 8, generator=batch.generator) < 1 / 3
    return (bits * 2 ** torch.arange(8)).sum(-1).to(batch.device, torch.uint8)


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_pinned_pages_come_before_all_others(batch: Batch, reduce: str) -> None:
    """By the bits of each row's state; a row in none has none."""
    places = torch.arange(len(batch.given) + 1, 1, -1, dtype=torch.int32, device=batch.device)
    places[2] = -1
    rows, bounds, pins = replace(spread(batch), places=places), written_bounds(batch), some_pins(batch)
    scores = batch.filled(UNTOUCHED, batch.heads, batch.columns // batch.page + 3, dtype=torch.float32)
    given = rows, batch.cache, batch.queries(), SELECT, reduce
    found, expected = both("page_scores", [scores, bounds], *given, pins=pins)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    plain = both("page_scores", [scores, bounds], *given)[0][0]
    pinned = found[0].isinf()
    assert torch.equal(found[0][~pinned], plain[~pinned]) and not plain.isinf().any()
    start, last = int(rows.starts[2]) // batch.page, int(rows.starts[3]) // batch.page
    assert int(pinned.sum()) > 10 and not pinned[:, start:last].any()


@pytest.mark.parametrize(("reduce", "want"), [("sum", SELECT), ("max", SELECT), ("sum", EVERY)])
def test_page_scores(batch: Batch, reduce: str, want: int) -> None:
    """The newest tokens are let into pages' bounds that don't have them yet, and the pages before them scored."""
    bounds = torch.zeros_like(written_bounds(batch))
    pages, filled = batch.all_pages()
    newest = naive.newest_slots(batch.rows, batch.cache)[batch.rows.modes != 0].flatten()
    filled[torch.searchsorted(pages, newest // batch.page)] -= 1
    naive.write_bounds(bounds, batch.cache, pages, filled)
    scores = batch.filled(UNTOUCHED, batch.heads, batch.columns // batch.page + 3, dtype=torch.float32)
    given = spread(batch), batch.cache, batch.queries(), want, reduce
    found, expected = both("page_scores", [scores, bounds], *given)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1], expected[1])
    if want == EVERY:
        assert torch.equal(found[1], written_bounds(batch))


def test_page_scores_of_several_chunks(small: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_plugins.kernels.quest._PAGES", 16)
    monkeypatch.setattr("attention_plugins.kernels.quest._programs_each", lambda *_: 1)
    test_page_scores(small, "sum", SELECT)
    test_pinned_pages_come_before_all_others(small, "sum")


def test_another_layout_is_an_error(small: Batch) -> None:
    from attention_plugins import kernels

    cache = replace(small.cache, codec=PermutedCodec.plain(small.page, small.dim))
    with pytest.raises(ValueError, match="read an InterleavedCodec's pages, not PermutedCodec's"):
        kernels.token_scores(small.scores(), small.rows, cache, small.queries(), SELECT)
