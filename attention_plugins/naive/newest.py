"""Where this step's tokens lie."""

from __future__ import annotations

import torch

from attention_plugins.decode.rows import DecodeRows, LayerCache
from attention_plugins.naive.sequences import Sequences


def newest_slots(rows: DecodeRows, cache: LayerCache) -> torch.Tensor:
    """Slots of the rows' newest tokens in one layer, of all modes: int64 [n, num_kv_heads]; 0 for no request."""
    sequences = Sequences.of(rows, cache)
    if not sequences.pages.shape[-1]:
        return torch.zeros_like(sequences.lengths)
    place = (sequences.lengths - 1).clamp(min=0)
    page = sequences.pages.gather(-1, place[..., None] // sequences.page_size)[..., 0]
    slot = page * sequences.page_size + place % sequences.page_size
    return torch.where(sequences.lengths > 0, slot, 0)
