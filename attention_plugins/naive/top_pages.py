"""The pages that a row reads: those of the highest scores."""

from __future__ import annotations

import torch

from attention_plugins.decode.rows import DecodeRows, LayerCache, Mode
from attention_plugins.naive.full_rows import full_rows
from attention_plugins.naive.sequences import Sequences, best, wanted_heads


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
