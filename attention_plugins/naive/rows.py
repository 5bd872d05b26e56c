"""Page tables of rows that read everything."""

from __future__ import annotations

import torch

from attention_plugins.decode.rows import DecodeRows, LayerCache
from attention_plugins.naive.sequences import Sequences, wanted_heads


def full_rows(
    pages_out: torch.Tensor, lengths_out: torch.Tensor, rows: DecodeRows, cache: LayerCache, want: int
) -> None:
    """Write one layer's page tables, one for each (row, KV head), as attention kernels take them.

    Args:
        pages_out: int32 [n * num_kv_heads, width], wide enough for every row; wanted rows' pages are written.
        lengths_out: int32 [n * num_kv_heads], tokens; 0 for rows that aren't wanted.
        want: set of `Mode`s.
    """
    sequences = Sequences.of(rows, cache)
    lengths_out.zero_()
    for row, head in wanted_heads(rows, cache, want):
        at, length = row * cache.geometry.num_kv_heads + head, int(sequences.lengths[row, head])
        used = -(-length // sequences.page_size)
        pages_out[at, :used] = sequences.pages[row, head, :used].int()
        lengths_out[at] = length
