"""Kernels that say what selectors read, against their naive twins, on batches of every kind of row."""

from __future__ import annotations

import math

import pytest
import torch

from attention_plugins import naive
from attention_plugins.decode.rows import Mode
from tests.kernels.selector_batch import EVERY, UNTOUCHED, Batch, Row, assert_same

pytest.importorskip("triton")
# The interpreter's numpy warns of infinities and NaNs, which belong to these numbers.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SELECT, REUSE, DENSE = Mode.SELECT, Mode.REUSE, Mode.DENSE


@pytest.fixture
def batch(device: torch.device) -> Batch:
    return Batch(dtype=torch.float16, device=device)


@pytest.mark.parametrize("want", [DENSE | REUSE, SELECT, 0])
def test_full_rows(batch: Batch, want: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_plugins.kernels.page_rows._COLUMNS", 16)
    sequences = len(batch.given) * 2
    outputs = [batch.filled(UNTOUCHED, sequences, 40)[:, :39], batch.filled(UNTOUCHED, sequences)]
    assert_same("full_rows", outputs, batch.rows, batch.cache, want)


def test_newest_slots(batch: Batch) -> None:
    from attention_plugins import kernels

    found = kernels.newest_slots(batch.rows, batch.cache)
    assert torch.equal(found, naive.newest_slots(batch.rows, batch.cache)) and found.dtype == torch.int64


@pytest.fixture(params=["registers", "chunks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One program for a row, or several."""
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
def test_top_slots(batch: Batch, way: str, as_places: bool, kind: str, width: int) -> None:
    scores, n = hard_scores(batch, batch.columns, kind), len(batch.given)
    into = torch.arange(n - 1, -1, -1, dtype=torch.int32, device=batch.device)
    into[4] = -1
    outputs = [batch.lists(width), batch.lists()]
    assert_same("top_slots", outputs, scores, batch.rows, batch.cache, SELECT, into, as_places=as_places)


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 36, 37, 38])
def test_any_budget(way: str, tokens: int, device: torch.device) -> None:
    """The newest token is always read."""
    batch = Batch([Row(37, tokens=tokens)], dtype=torch.float16, device=device)
    scores, pages = batch.scores(ties=True), [batch.filled(UNTOUCHED, 2, 12), batch.filled(UNTOUCHED, 2)]
    assert_same(
        "top_slots", [batch.lists(40), batch.lists()], scores, batch.rows, batch.cache, SELECT, batch.filled(0, 1)
    )
    assert_same("top_pages", pages, scores, batch.rows, batch.cache, SELECT)


@pytest.mark.parametrize(
    ("want", "kind"), [(SELECT, "random"), (SELECT | REUSE, "ties"), (EVERY, "odd"), (SELECT, "equal"), (0, "random")]
)
def test_top_pages(batch: Batch, way: str, want: int, kind: str) -> None:
    scores, sequences = hard_scores(batch, batch.columns // batch.page, kind), len(batch.given) * 2
    outputs = [batch.filled(UNTOUCHED, sequences, 60), batch.filled(UNTOUCHED, sequences)]
    assert_same("top_pages", outputs, scores, batch.rows, batch.cache, want)


@pytest.mark.parametrize("n", [4000, 40_000])
@pytest.mark.parametrize("different", [2, 300, 10**9])
def test_many_scores(n: int, different: int, device: torch.device) -> None:
    """As many as the kernels are made for, and as they are set."""
    if n > 4000 and device.type == "cpu":
        pytest.skip("takes long in the interpreter")
    batch = Batch([Row(n, tokens=1500), Row(n // 2, tokens=700)], page=16, dtype=torch.float16, device=device)
    scores = torch.randint(-different, different, (2, batch.columns), generator=batch.generator).to(device) / 7
    into = batch.filled(0, 2)
    into[0] = 1
    outputs = [batch.lists(1500), batch.lists()]
    assert_same("top_slots", outputs, scores, batch.rows, batch.cache, SELECT, into, as_places=True)


@pytest.mark.parametrize("lists", [1, 2])
def test_place_slots(batch: Batch, lists: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attention_plugins.kernels.places._PLACES", 8)
    n = len(batch.given)
    places = torch.randint(0, 40, (n, lists, 20), dtype=torch.int32, generator=batch.generator).to(batch.device)
    counts = torch.randint(0, 21, (n, lists), dtype=torch.int32, generator=batch.generator).to(batch.device)
    assert_same("place_slots", [batch.lists(20)], places, counts, batch.rows, batch.cache, REUSE | SELECT)


def test_append_and_evict(batch: Batch) -> None:
    """Round after round; lists that are full, and such that have room beyond what is to stay."""
    n = len(batch.given)
    counts = torch.randint(0, 21, (n, 2), generator=batch.generator).int().to(batch.device)
    counts[0, 0] = 20
    into = torch.randperm(n, generator=batch.generator).int().to(batch.device)
    into[8], lists = -1, [batch.lists(20), counts]
    for _ in range(4):
        logits = (torch.randn(n, 2, 20, generator=batch.generator) * 2).round().to(batch.device)
        logits[0, 0, 2] = math.nan
        lists = assert_same("append_newest", lists, into, batch.rows, batch.cache, SELECT | REUSE)
        lists = assert_same("evict_least", lists, into, batch.rows, logits, SELECT | REUSE)


def test_the_same_names() -> None:
    from attention_plugins import kernels

    assert kernels.__all__ == naive.__all__
