"""Recycled Attention's set of tokens: one comes each step, and the least attended one goes."""

from __future__ import annotations

import torch

from attention_plugins.decode.rows import DecodeRows, LayerCache
from attention_plugins.naive.newest import newest_slots
from attention_plugins.naive.sequences import nan_first, wanted


def append_newest(
    slots: torch.Tensor, counts: torch.Tensor, into: torch.Tensor, rows: DecodeRows, cache: LayerCache, want: int
) -> None:
    """Append wanted rows' newest tokens to their lists, where there is room.

    Args:
        slots: int32 [S, num_kv_heads, W].
        counts: int32 [S, num_kv_heads], how many are listed.
        into: int32 [n], first index into both; -1: nothing is done.
        want: set of `Mode`s.
    """
    newest, indices = newest_slots(rows, cache), into.tolist()
    for row in wanted(rows, want):
        if indices[row] < 0:
            continue
        for head, count in enumerate(counts[indices[row]].tolist()):
            if count < slots.shape[-1]:
                slots[indices[row], head, count] = newest[row, head]
                counts[indices[row], head] = count + 1


def evict_least(
    slots: torch.Tensor, counts: torch.Tensor, into: torch.Tensor, rows: DecodeRows, logits: torch.Tensor, want: int
) -> None:
    """Where wanted rows list more than K = `rows.tokens` tokens, let the last one take the place of the least attended
    among the first K (ties to the lower index, NaN counts as infinity), and K be the count.

    Args:
        slots, counts, into, want: as `append_newest` takes them.
        logits: float32 [n, num_kv_heads, W], what each listed token got (see `slot_attention`).
    """
    indices = into.tolist()
    for row in wanted(rows, want):
        keep = int(rows.tokens[row])
        if indices[row] < 0 or keep < 1:
            continue
        for head, count in enumerate(counts[indices[row]].tolist()):
            if count > keep:
                least = int(nan_first(logits[row, head, :keep]).argmin())
                slots[indices[row], head, least] = slots[indices[row], head, count - 1]
                counts[indices[row], head] = keep
