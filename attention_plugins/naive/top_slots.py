"""The tokens that a row reads: those of the highest scores."""

from __future__ import annotations

import torch

from attention_plugins.decode.rows import DecodeRows, LayerCache
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
