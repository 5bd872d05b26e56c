"""Tokens that a prompt chose: which, of which request, and that full steps choose them first."""

from __future__ import annotations

from dataclasses import replace

import torch

from attention_plugins.decode.pins import Pins
from attention_plugins.decode.rows import DecodeRows, Mode
from tests.attention_plugins.test_readers import place, settings
from tests.kernels.selector_batch import Batch, Row

HEADS, DIM = 2, 8


def rows_of(modes: list[Mode], places: list[int]) -> tuple[DecodeRows, torch.Tensor]:
    """Rows of 40 tokens, with these states, and scores of them."""
    batch = Batch([Row(40, mode, 24) for mode in modes], heads=HEADS, dim=DIM)
    return replace(batch.rows, places=torch.tensor(places, dtype=torch.int32)), batch.scores()


def test_pinned_places_come_first_in_rows_that_select() -> None:
    pins = Pins(place(settings(["recycled"]), heads=HEADS, layers=3))
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
    for layer in (0, 2):
        unchanged = before.clone()
        pins.raise_scores(unchanged, rows, layer)
        assert torch.equal(unchanged, before), "no other layer has them"


def test_nothing_is_pinned_of_the_next_request() -> None:
    pins = Pins(place(settings(["recycled"]), heads=HEADS, layers=2))
    for layer in range(2):
        pins.choose(layer, 1, torch.rand(HEADS, 30), 7)
        pins.choose(layer, 3, torch.rand(HEADS, 30), 7)
    pins.clear(1)
    assert bool((pins.places[:, 1] == -1).all()) and int((pins.places[:, 3] >= 0).sum()) == 2 * HEADS * 7


def test_fewer_than_asked_for_where_there_are_no_more() -> None:
    pins = Pins(place(settings(["recycled"]), heads=HEADS, layers=1))
    pins.choose(0, 0, torch.rand(HEADS, 3), 10)
    assert pins.places[0, 0, :, :4].tolist() == [[0, 1, 2, -1]] * HEADS
