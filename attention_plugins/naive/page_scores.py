"""Quest's score for every page of a row: no key in it has a larger logit."""

from __future__ import annotations

from typing import Literal

import torch

from attention_plugins.decode.rows import DecodeRows, LayerCache
from attention_plugins.naive.sequences import Sequences, nan_first, real_queries, wanted_heads


def page_scores(
    scores: torch.Tensor,
    bounds: torch.Tensor,
    rows: DecodeRows,
    cache: LayerCache,
    queries: torch.Tensor,
    want: int,
    reduce: Literal["sum", "max"] = "sum",
) -> None:
    """Over a group's query heads, the sum or the largest of a page's greatest possible products with the query. They
    aren't multiplied with the softmax scale.

    Args:
        scores: float32 [num_kv_heads, pages]; of wanted rows, those from `rows.starts // page_size` on are written. A
            score that isn't a number is stored as infinity.
        bounds: see `page_bounds`; the newest token's key must be in them (`grow_bounds`).
        queries: [n, num_kv_heads, group, head_dim].
        want: set of `Mode`s.
    """
    sequences, real = Sequences.of(rows, cache), real_queries(cache, queries)
    for row, head in wanted_heads(rows, cache, want):
        used = -(-int(sequences.lengths[row, head]) // sequences.page_size)
        low, high = bounds[sequences.pages[row, head, :used]].float().unbind(1)
        # The larger of q * low and q * high, in each dimension.
        each = real[row, head].clamp(min=0) @ high.T + real[row, head].clamp(max=0) @ low.T
        start = int(rows.starts[row]) // sequences.page_size
        scores[head, start : start + used] = nan_first(each.sum(0) if reduce == "sum" else each.amax(0))
