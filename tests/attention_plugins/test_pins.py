"""Tokens that a prompt chose: which, of which request, and that full steps choose them first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from attention_plugins import naive
from attention_plugins.decode.pins import PinnedPages, Pins, page_votes
from attention_plugins.decode.rows import DecodeRows, Mode
from attention_plugins.decode.schedule import Read
from attention_plugins.naive.paged_attention import read_pages
from attention_plugins.vllm_adapter.readers import make_readers
from kvcache.evidence import LayerEvidence
from kvcache.scorers import window_attention
from tests.attention_plugins.test_readers import place, settings
from tests.kernels.selector_batch import Batch, Row

HEADS, DIM, WINDOW = 2, 8, 8


def rows_of(modes: list[Mode], places: list[int]) -> tuple[DecodeRows, torch.Tensor]:
    """Rows of 40 tokens, with these states, and scores of them."""
    batch = Batch([Row(40, mode, 24) for mode in modes], heads=HEADS, dim=DIM)
    return replace(batch.rows, places=torch.tensor(places, dtype=torch.int32)), batch.scores()


def test_pinned_places_come_first_in_rows_that_select() -> None:
    pins = Pins(place(settings(["recycled"]), heads=HEADS), 3)
    votes = torch.rand(HEADS, 39)
    pins.choose(1, 4, votes, 5)
    rows, scores = rows_of([Mode.SELECT, Mode.SELECT, Mode.REUSE, Mode.SELECT], [4, 2, 4, -1])
    scores.copy_(torch.rand(scores.shape))
    before = scores.clone()
    pins.raise_scores(scores, rows, 1)
    changed = scores != before
    start = int(rows.starts[0])
    for head in range(HEADS):
        expected = start + votes[head].topk(5).indices.sort().values
        assert changed[head].nonzero().flatten().tolist() == expected.tolist()
        assert scores[head].topk(5).indices.sort().values.tolist() == expected.tolist()
    for group in (0, 2):
        unchanged = before.clone()
        pins.raise_scores(unchanged, rows, group)
        assert torch.equal(unchanged, before), "no other layer's list has them"


def test_nothing_is_pinned_of_the_next_request() -> None:
    pins = Pins(place(settings(["recycled"]), heads=HEADS), 2)
    for group in range(2):
        pins.choose(group, 1, torch.rand(HEADS, 30), 7)
        pins.choose(group, 3, torch.rand(HEADS, 30), 7)
    pins.clear(1)
    assert bool((pins.places[:, 1] == -1).all()) and int((pins.places[:, 3] >= 0).sum()) == 2 * HEADS * 7


def test_fewer_than_asked_for_where_there_are_no_more() -> None:
    pins = Pins(place(settings(["recycled"]), heads=HEADS), 1)
    pins.choose(0, 0, torch.rand(HEADS, 3), 10)
    assert pins.places[0, 0, :, :4].tolist() == [[0, 1, 2, -1]] * HEADS


@pytest.mark.parametrize("shared", [True, False])
def test_tidal_pins_what_the_readers_of_each_list_look_for(shared: bool) -> None:
    """The lists of layers 0 and 3 of six are read by 1 and 2, and by 4 and 5."""
    words, n, group = settings(["tidal"]), 200, 2
    where = replace(place(words, layers=6), calibration={"tidal.layers": torch.tensor([0, 3])})
    reader: Any = make_readers(words, where, naive, read_pages)["tidal"]
    torch.manual_seed(0)
    keys, queries = torch.randn(6, HEADS, n, DIM), 3 * torch.randn(6, WINDOW, HEADS * group, DIM)
    read = Read("r", "tidal", Mode.SELECT, n + 1, 64, float(shared), 2, pinned=20, prepare=True)
    pages = torch.zeros(6, HEADS, 13, dtype=torch.int64)
    reader.open(read, pages, lambda layer: LayerEvidence(layer, keys[layer], keys[layer], queries[layer], 1.0))
    votes = [
        window_attention(q, k, 1.0, pooling="max", kernel=21, group_reduce="max", window_reduce="max")
        for q, k in zip(queries, keys, strict=True)
    ]
    for number, readers in enumerate([(1, 2), (4, 5)]):
        most = torch.stack([votes[layer] for layer in readers]).amax(0)
        most = most.amax(0, keepdim=True).expand(HEADS, -1) if shared else most
        for head in range(HEADS):
            found = reader.pins.places[number, 2, head, :20].tolist()
            assert float(most[head, found].min()) >= float(most[head].topk(20).values.min())
            assert sorted(set(found)) == found and reader.pins.places[number, 2, head, 20] == -1
    assert bool((reader.pins.places[:, [0, 1, 3]] == -1).all())


def test_the_pages_that_are_pinned() -> None:
    pins = PinnedPages(place(settings(["quest"]), heads=HEADS, layers=3, page_size=2, max_model_len=44))
    assert pins.bits.shape == (3, 7, HEADS, 3), "22 pages and those that a step may add"
    votes = torch.rand(HEADS, 20)
    pins.choose(1, 4, votes, 5)
    for head in range(HEADS):
        numbers = pins.bits[1, 4, head].tolist()
        found = [page for page in range(24) if numbers[page // 8] >> page % 8 & 1]
        assert found == votes[head].topk(5).indices.sort().values.tolist()
    before = pins.bits.clone()
    pins.choose(2, 4, votes, 30)
    assert pins.bits[2, 4].tolist() == [[255, 255, 15]] * HEADS, "all there are"
    pins.choose(2, 3, votes, 1)
    pins.clear(4)
    assert not pins.bits[:, 4].any() and pins.bits[2, 3].any() and before[1, 4].any()


def test_votes_of_pages() -> None:
    """Tokens 6 and 7 are the window; page 2 holds one of them and token 5."""
    votes = torch.tensor([[0.1, 0.3, 0.2, 0.0, 0.4, 0.9], [0.0, 0.0, 0.5, 0.6, 0.0, 0.0]])
    inf = float("inf")
    assert page_votes(votes, 8, 2).tolist() == [[t, u, v, inf] for t, u, v in votes.view(2, 3, 2).amax(-1).tolist()]
    assert page_votes(votes, 8, 3).tolist() == [[votes[0, 1], votes[0, 5], inf], [0.5, votes[1, 3], inf]]
    assert page_votes(votes, 7, 4).tolist() == [[votes[0, 1], inf], [votes[1, 3], inf]]
