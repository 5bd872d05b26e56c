"""The naive twins of selectors' operations, against brute force on what was written into the cache."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from attention_plugins import naive
from attention_plugins.decode.rows import DecodeRows, Mode
from kvcache.evidence import QuantScales
from tests.kernels.selector_batch import EVERY, MIXED, UNTOUCHED, Batch, Row

SELECT = Mode.SELECT


@pytest.fixture(params=["plain", "permuted", "fp8"])
def batch(request: pytest.FixtureRequest) -> Batch:
    if request.param == "fp8":
        return Batch(dtype=torch.uint8, quant=QuantScales(1.0, 0.25, 4.0))
    return Batch(permuted=request.param == "permuted")


def test_full_rows(batch: Batch) -> None:
    n = len(batch.given)
    pages, lengths = batch.filled(UNTOUCHED, n * 2, 40), batch.filled(UNTOUCHED, n * 2)
    naive.full_rows(pages, lengths, batch.rows, batch.cache, Mode.DENSE | Mode.REUSE)
    for row in range(n):
        for head in range(2):
            slots = batch.slots[row][head] if batch.given[row].mode != SELECT else torch.zeros(0, dtype=torch.int64)
            expected = (slots[:: batch.page] // batch.page).tolist()
            assert pages[row * 2 + head].tolist() == expected + [UNTOUCHED] * (40 - len(expected))
            assert lengths[row * 2 + head] == len(slots)


def test_newest_slots(batch: Batch) -> None:
    found = naive.newest_slots(batch.rows, batch.cache)
    expected = [[int(slots[-1]) if len(slots) else 0 for slots in heads] for heads in batch.slots]
    assert found.tolist() == expected and found.dtype == torch.int64


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("with_lse", [False, True])
def test_token_scores(batch: Batch, with_lse: bool, reduce: str) -> None:
    queries, lse = batch.queries(), torch.randn(len(batch.given), 2, 3) if with_lse else None
    scores = batch.filled(UNTOUCHED, 2, batch.columns, dtype=torch.float32)
    naive.token_scores(scores, batch.rows, batch.cache, queries, SELECT, lse, reduce=reduce)  # type: ignore[arg-type]
    expected = torch.full_like(scores, UNTOUCHED)
    for row in batch.wanted(SELECT):
        for head in range(2):
            start = int(batch.rows.starts[row])
            for place, key in enumerate(batch.keys[row][head]):
                each = queries[row, head].float() @ key * batch.cache.scale
                if lse is not None:
                    each = (each - lse[row, head]).exp()
                expected[head, start + place] = each.max() if reduce == "max" else each.mean()
    torch.testing.assert_close(scores, expected)


def test_scores_of_labels_and_of_what_is_not_a_number() -> None:
    batch = Batch()
    labels = torch.randn(len(batch.cache.pages) * batch.page, 5)
    labels[batch.slots[0][1][3]] = math.nan
    scores = batch.filled(UNTOUCHED, 2, batch.columns, dtype=torch.float32)
    queries = batch.queries(5)
    naive.token_scores(scores, batch.rows, batch.cache, queries, SELECT, labels=labels)
    expected = (labels[batch.slots[0][0]] @ queries[0, 0].T).amax(1) * batch.cache.scale
    torch.testing.assert_close(scores[0, : batch.given[0].length], expected)
    assert scores[1].isinf().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("as_places", [False, True])
def test_top_slots(batch: Batch, as_places: bool, ties: bool) -> None:
    scores, n = batch.scores(ties=ties), len(batch.given)
    scores[0, 3], scores[1, 2] = math.nan, math.inf
    out, counts = batch.filled(UNTOUCHED, n, 2, 70), batch.filled(UNTOUCHED, n, 2)
    into = torch.arange(n - 1, -1, -1, dtype=torch.int32)
    into[8] = -1
    naive.top_slots(out, counts, scores, batch.rows, batch.cache, SELECT, into, as_places)
    for row in range(n):
        at = n - 1 - row
        if row not in batch.wanted(SELECT) or row == 8:
            assert (out[at] == UNTOUCHED).all() and (counts[at] == UNTOUCHED).all()
            continue
        for head in range(2):
            length, start = len(batch.slots[row][head]), int(batch.rows.starts[row])
            line = scores[head, start : start + length - 1].nan_to_num(nan=math.inf).tolist()
            order = sorted(range(length - 1), key=lambda place: (-line[place], place))
            places = [*sorted(order[: batch.given[row].tokens - 1]), length - 1]
            expected = places if as_places else batch.slots[row][head][places].tolist()
            assert out[at, head].tolist() == expected + [UNTOUCHED] * (70 - len(expected))
            assert counts[at, head] == len(expected)


def test_never_more_than_fit() -> None:
    batch = Batch([Row(40, tokens=30)])
    out, counts = batch.filled(UNTOUCHED, 1, 2, 5), batch.filled(UNTOUCHED, 1, 2)
    naive.top_slots(
        out, counts, batch.scores(), batch.rows, batch.cache, SELECT, torch.zeros(1, dtype=torch.int32), True
    )
    assert counts.tolist() == [[5, 5]] and (out[..., -1] == 39).all()


@pytest.mark.parametrize("lists", [1, 2])
def test_place_slots(batch: Batch, lists: int) -> None:
    n = len(batch.given)
    places = torch.randint(0, 12, (n, lists, 6), dtype=torch.int32)
    counts = torch.randint(0, 7, (n, lists), dtype=torch.int32)
    out = batch.filled(UNTOUCHED, n, 2, 6)
    naive.place_slots(out, places, counts, batch.rows, batch.cache, Mode.REUSE | SELECT)
    for row in range(n):
        for head in range(2):
            source = head % lists
            count = int(counts[row, source]) if row in batch.wanted(Mode.REUSE | SELECT) else 0
            slots = batch.slots[row][head]
            expected = [int(slots[min(place, len(slots) - 1)]) for place in places[row, source, :count].tolist()]
            assert out[row, head].tolist() == expected + [UNTOUCHED] * (6 - count)


def test_slot_attention(batch: Batch) -> None:
    n, queries = len(batch.given), batch.queries()
    into = torch.randperm(n).int()
    slots, counts = batch.filled(0, n, 2, 9), batch.filled(0, n, 2)
    chosen = {}
    for row in batch.wanted(EVERY):
        for head in range(2):
            have = batch.slots[row][head]
            places = chosen[row, head] = torch.randperm(len(have))[: 1 + (row + head) % 9]
            slots[into[row], head, : len(places)] = have[places].int()
            counts[into[row], head] = len(places)
    out = torch.full(queries.shape, float(UNTOUCHED), dtype=queries.dtype)
    logits = batch.filled(UNTOUCHED, n, 2, 9, dtype=torch.float32)
    want = SELECT | Mode.REUSE
    naive.slot_attention(out, queries, slots, counts, into, batch.rows, batch.cache, want, logits)
    expected, expected_logits = torch.full_like(out, UNTOUCHED), torch.full_like(logits, UNTOUCHED)
    for row in batch.wanted(want):
        for head in range(2):
            keys, values = (part[row][head][chosen[row, head]] for part in (batch.keys, batch.values))
            shares = (queries[row, head].float() @ keys.T * batch.cache.scale).softmax(-1)
            expected[row, head] = (shares @ values).to(out.dtype)
            expected_logits[row, head, : len(keys)] = shares.amax(0).log()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(logits, expected_logits)


def test_nothing_listed_is_zeros() -> None:
    batch = Batch([Row(9)])
    out = torch.ones(1, 2, 3, 16)
    lists = batch.filled(0, 1, 2, 4), batch.filled(0, 1, 2), batch.filled(0, 1)
    naive.slot_attention(out, batch.queries(), *lists, batch.rows, batch.cache, SELECT)
    assert not out.any()


def with_spread(batch: Batch, spread: float) -> DecodeRows:
    return replace(batch.rows, thresholds=torch.full_like(batch.rows.thresholds, spread))


@pytest.mark.parametrize(("spread", "expected"), [(1.0, [1.0, 3.0]), (0.5, [0.5, 1.5]), (0.0, [0.0, 0.0])])
def test_the_golden_scores(spread: float, expected: list[float]) -> None:
    """Keys (1, 0), (0, 1) and (2, 2), (-1, -1) under the query (1, -1), whose products with both pages' middles are 0;
    the last page, of (9, 9), has no score."""
    batch = Batch([Row(5)], heads=1, group=1, dim=2, page=2)
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [-1.0, -1.0], [9.0, 9.0]])
    batch.cache.codec.write_tokens(batch.cache.pages, batch.slots[0][0], keys, keys)
    bounds, scores = written_bounds(batch), torch.zeros(1, 3)
    rows = with_spread(batch, spread)
    naive.page_scores(scores, bounds, rows, batch.cache, torch.tensor([[[[1.0, -1.0]]]]), SELECT)
    assert scores.tolist() == [[*expected, 0.0]]


def test_the_golden_scores_with_a_pin() -> None:
    """The first row has state 1, in which page 1 is pinned; the second has none."""
    batch = Batch([Row(7), Row(7)], heads=1, group=1, dim=2, page=2)
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [-1.0, -1.0], [0.0, 0.0], [0.0, 0.0], [9.0, 9.0]])
    for row in range(2):
        batch.cache.codec.write_tokens(batch.cache.pages, batch.slots[row][0], keys, keys)
    rows, pins = replace(with_spread(batch, 1.0), places=torch.tensor([1, -1], dtype=torch.int32)), torch.zeros(2, 1, 1)
    pins[:, 0, 0] = torch.tensor([0b101, 0b010])
    bounds, scores, queries = written_bounds(batch), torch.zeros(1, 8), torch.tensor([[[[1.0, -1.0]]]] * 2)
    naive.page_scores(scores, bounds, rows, batch.cache, queries, SELECT, pins=pins.to(torch.uint8))
    assert scores.tolist() == [[1.0, math.inf, 0.0, 0.0, 1.0, 3.0, 0.0, 0.0]]


def written_bounds(batch: Batch) -> torch.Tensor:
    bounds = naive.page_bounds(len(batch.cache.pages), batch.dim, batch.device)
    naive.write_bounds(bounds, batch.cache, *batch.all_pages())
    return bounds


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_page_scores_are_no_less_than_any_logit(batch: Batch, reduce: str) -> None:
    bounds, queries = written_bounds(batch), batch.queries()
    scores = batch.filled(UNTOUCHED, 2, batch.columns // batch.page, dtype=torch.float32)
    naive.page_scores(scores, bounds, with_spread(batch, 1.0), batch.cache, queries, SELECT, reduce)  # type: ignore[arg-type]
    expected = torch.full_like(scores, UNTOUCHED)
    for row in batch.wanted(SELECT):
        for head in range(2):
            start = int(batch.rows.starts[row]) // batch.page
            for number, keys in enumerate(batch.keys[row][head].split(batch.page)[:-1]):
                low, high = keys.amin(0).to(bounds.dtype).float(), keys.amax(0).to(bounds.dtype).float()
                q = queries[row, head].float()
                each = torch.maximum(q * low, q * high).sum(-1)
                logits = (q @ keys.T).amax(-1)
                assert (each >= logits - 2e-2 * logits.abs()).all()
                expected[head, start + number] = each.sum() if reduce == "sum" else each.max()
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_bounds_grow_as_they_are_written(dtype: torch.dtype) -> None:
    """Token by token from nothing, in a compacted row too."""
    given = (Row(30), Row(45, compacted=2), Row(0), Row(30, Mode.DENSE))
    batch = Batch(given, dtype=dtype, quant=QuantScales(1.0, 0.37) if dtype == torch.uint8 else QuantScales())
    bounds, expected = (
        torch.full_like(naive.page_bounds(len(batch.cache.pages), batch.dim, batch.device), 99.0),
        written_bounds(batch),
    )
    queries, before = batch.queries(), torch.full((2, batch.columns // 4), -math.inf)
    pages, _ = batch.all_pages()
    for back in range(30, -1, -1):
        rows = replace(with_spread(batch, 1.0), seq_lens=(batch.rows.seq_lens - back).clamp(min=0))
        rows.slots[(rows.seq_lens < 13) & (rows.slots != batch.tables.identity)] = -1
        if back == 30:  # what lies before the first step of the compacted row is written at once
            for head in range(2):
                slots = batch.slots[1][head][: len(batch.slots[1][head]) - 31]
                have, filled = (slots // 4).unique(return_counts=True)
                naive.write_bounds(bounds, batch.cache, have, filled)
        scores = torch.full_like(before, -math.inf)
        naive.page_scores(scores, bounds, rows, batch.cache, queries, EVERY)
        assert (scores >= before - 1e-4).all()  # a product of another shape may be rounded otherwise
        before = scores
    assert torch.equal(bounds[pages], expected[pages])


def test_only_wanted_rows_grow() -> None:
    batch = Batch()
    bounds = naive.page_bounds(len(batch.cache.pages), batch.dim, batch.device)
    scores = torch.zeros(2, batch.columns)
    naive.page_scores(scores, bounds, batch.rows, batch.cache, batch.queries(), Mode.DENSE)
    newest = naive.newest_slots(batch.rows, batch.cache)[batch.wanted(Mode.DENSE)] // batch.page
    assert bounds.flatten(1).any(1).nonzero().flatten().tolist() == sorted(newest.flatten().tolist())


@pytest.mark.parametrize("ties", [False, True])
def test_top_pages(batch: Batch, ties: bool) -> None:
    scores, n, page = batch.scores(batch.columns // batch.page, ties), len(batch.given), batch.page
    scores[0, 3] = math.nan
    pages, lengths = batch.filled(UNTOUCHED, n * 2, 60), batch.filled(UNTOUCHED, n * 2)
    naive.top_pages(pages, lengths, scores, batch.rows, batch.cache, SELECT)
    for row, given in enumerate(batch.given):
        for head in range(2):
            slots, at = batch.slots[row][head], row * 2 + head
            if not len(slots) or given.mode == Mode.REUSE:
                assert lengths[at] == 0 and (pages[at] == UNTOUCHED).all()
                continue
            have, start = (slots[::page] // page).tolist(), int(batch.rows.starts[row]) // page
            line = scores[head, start : start + len(have) - 1].nan_to_num(nan=math.inf).tolist()
            order = sorted(range(len(line)), key=lambda number: (-line[number], number))
            k = len(line) if given.mode == Mode.DENSE else -(-given.tokens // page) - 1
            chosen = [*sorted(order[:k]), len(line)]
            assert pages[at, : len(chosen)].tolist() == [have[number] for number in chosen]
            assert (pages[at, len(chosen) :] == UNTOUCHED).all()
            assert lengths[at] == page * (len(chosen) - 1) + len(slots) - page * (len(have) - 1)


def test_one_comes_and_the_least_attended_goes() -> None:
    batch = Batch([replace(row, tokens=3) for row in MIXED])
    n, want = len(batch.given), Mode.REUSE | SELECT
    slots, counts = batch.filled(5, n, 2, 6), batch.filled(3, n, 2)
    counts[5, 1], counts[8, 0], counts[9] = 6, 1, 2
    into = torch.arange(n, dtype=torch.int32)
    into[4] = -1
    before = slots.clone()
    naive.append_newest(slots, counts, into, batch.rows, batch.cache, want)
    newest = naive.newest_slots(batch.rows, batch.cache).int()
    active = [row for row in batch.wanted(want) if row != 4]
    expected_counts = batch.filled(3, n, 2)
    expected_counts[active] = 4
    expected_counts[5, 1], expected_counts[8, 0], expected_counts[9] = 6, 2, 3
    assert counts.tolist() == expected_counts.tolist()
    for row in active:
        for head in range(2):
            if (row, head) != (5, 1):
                at = int(counts[row, head]) - 1
                before[row, head, at] = newest[row, head]
    assert torch.equal(slots, before)

    logits = torch.tensor([-1.0, -2.0, -2.0, -9.0, 0.0, 0.0]).expand(n, 2, 6).clone()
    logits[0, 0, 1] = math.nan
    naive.evict_least(slots, counts, into, batch.rows, logits, want)
    for row in active:
        for head in range(2):
            had = int(expected_counts[row, head])
            if had > 3:
                before[row, head, 2 if (row, head) == (0, 0) else 1] = before[row, head, had - 1]
                assert counts[row, head] == 3
            else:
                assert counts[row, head] == had
    assert torch.equal(slots, before)
