"""What another layer has selected, in this one."""

from __future__ import annotations

import torch

from attention_plugins.decode.rows import DecodeRows, LayerCache
from attention_plugins.naive.sequences import Sequences, wanted_heads


def place_slots(
    slots_out: torch.Tensor, places: torch.Tensor, counts: torch.Tensor, rows: DecodeRows, cache: LayerCache, want: int
) -> None:
    """Slots of places in this layer.

    Args:
        slots_out: int32 [n, num_kv_heads, W]; of wanted rows, as many as counted are written.
        places: int32 [n, 1 or num_kv_heads, W]: one list for all heads, or each its own. A place behind a row's end
            stands for its newest token.
        counts: int32 [n, 1 or num_kv_heads].
        want: set of `Mode`s.
    """
    sequences = Sequences.of(rows, cache)
    for row, head in wanted_heads(rows, cache, want):
        source = head if places.shape[1] > 1 else 0
        count = int(counts[row, source])
        found = places[row, source, :count].long().clamp(max=int(sequences.lengths[row, head]) - 1)
        slots_out[row, head, :count] = sequences.slots(row, head, found).int()
