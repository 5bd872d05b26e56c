"""What a row reads: the tokens, or the pages, of the highest scores."""

from __future__ import annotations

import torch

from attention_plugins.decode.rows import DecodeRows, LayerCache, Mode
from attention_plugins.naive.rows import full_rows
from attention_plugins.naive.sequences import Sequences, best, wanted_heads


def top_slots(
    slots_out: torch.Tensor,
    counts_out: torch.Tensor,
    scores: torch.Tensor,
    rows: DecodeRows,
    cache: LayerCache,
    want: int,
    into: torch.Tensor,
    as_places: bool = False,
) -> None:
    """For each head of wanted rows the newest token and those of the highest scores, `rows.tokens` of them together, or
    all there are. Ties go to the lower place, NaN counts as infinity.

    Args:
        slots_out: int32 [S, num_kv_heads, W], filled from the front by ascending place, never beyond W.
        counts_out: int32 [S, num_kv_heads], how many.
        scores: float32 [num_kv_heads, columns], from `rows.starts` on; the newest token's isn't looked at.
        want: set of `Mode`s.
        into: int32 [n], first index into the outputs; -1: nothing is written.
        as_places: write places instead of slots, for other layers (see `place_slots`).
    """
    sequences, indices = Sequences.of(rows, cache), into.tolist()
    for row, head in wanted_heads(rows, cache, want):
        if indices[row] < 0:
            continue
        last, start = int(sequences.lengths[row, head]) - 1, int(rows.starts[row])
        budget = min(int(rows.tokens[row]), slots_out.shape[-1])
        places = best(scores[head, start : start + last], max(budget - 1, 0))
        places = torch.cat([places, places.new_tensor([last])])
        written = places if as_places else sequences.slots(row, head, places)
        slots_out[indices[row], head, : len(places)] = written.int()
        counts_out[indices[row], head] = len(places)


def top_pages(
    pages_out: torch.Tensor,
    lengths_out: torch.Tensor,
    scores: torch.Tensor,
    rows: DecodeRows,
    cache: LayerCache,
    want: int,
) -> None:
    """Page tables for one attention call over all rows.

    Wanted rows get, for each head, their last page and those of the highest scores, ceil(tokens / page size) of them
    together or all there are; pages ascend, ties go to the lower one, NaN counts as infinity. Rows in mode DENSE get
    all their pages, others none.

    Args:
        pages_out: int32 [n * num_kv_heads, width], wide enough for every row; what is behind a row's pages stays.
        lengths_out: int32 [n * num_kv_heads], tokens in those pages; 0 for no request.
        scores: float32 [num_kv_heads, pages], from `rows.starts // page_size` on; the last page's isn't looked at.
        want: set of `Mode`s.
    """
    full_rows(pages_out, lengths_out, rows, cache, int(Mode.DENSE) & ~int(want))
    sequences, size = Sequences.of(rows, cache), cache.geometry.page_size
    for row, head in wanted_heads(rows, cache, want):
        length, start = int(sequences.lengths[row, head]), int(rows.starts[row]) // size
        last = -(-length // size) - 1
        others = best(scores[head, start : start + last], max(-(-int(rows.tokens[row]) // size) - 1, 0))
        chosen = torch.cat([others, others.new_tensor([last])])
        at = row * cache.geometry.num_kv_heads + head
        pages_out[at, : len(chosen)] = sequences.pages[row, head, chosen].int()
        lengths_out[at] = len(others) * size + length - last * size
