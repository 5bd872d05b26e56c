"""Quest: of every page the smallest and largest number of its keys, dimension by dimension, and what no logit in the
page can exceed."""

from __future__ import annotations

from typing import Literal

import torch

from attention_plugins.decode.rows import DecodeRows, LayerCache
from attention_plugins.naive.newest import newest_slots
from attention_plugins.naive.sequences import Sequences, nan_first, read, real_queries, wanted_heads
from kvcache.evidence import dequantise

_PAGES_AT_ONCE = 4096


BOUNDS = torch.float8_e4m3fn
"""Half the memory of a 16-bit cache's numbers, and half the time to read them. Rounding keeps the order, so that bounds
which grow token by token are those of the whole page."""
_LARGEST = torch.finfo(BOUNDS).max


def page_bounds(num_pages: int, head_dim: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Room for the bounds of a cache's pages: `BOUNDS` [num_pages, 2, head_dim], smallest and largest; zeros.

    Rounded to nearest: the score of a page may be lower than its best key's by that much, up to a sixteenth. Beyond
    +-448 they end.
    """
    return torch.zeros(num_pages, 2, head_dim, dtype=BOUNDS, device=device)


def as_bounds(keys: torch.Tensor) -> torch.Tensor:
    """Rounded as bounds are; NaN stays."""
    return keys.float().clamp(-_LARGEST, _LARGEST).to(BOUNDS)


def write_bounds(
    bounds: torch.Tensor, cache: LayerCache, pages: torch.Tensor, filled: torch.Tensor | None = None
) -> None:
    """Compute the bounds of whole pages.

    Args:
        bounds: see `page_bounds`.
        pages: int64 [m], of any layer, as long as `cache.quant` is its own.
        filled: int64 [m], how many slots of each page count, all if None; bounds of a page with none stay.
    """
    size, raw = cache.geometry.page_size, bounds.view(torch.uint8)  # whose elements torch can choose and set
    for start in range(0, len(pages), _PAGES_AT_ONCE):
        some = pages[start : start + _PAGES_AT_ONCE]
        keys = dequantise(cache.codec.unpack(cache.pages[some])[0], cache.quant.key)
        if filled is None:
            raw[some] = as_bounds(torch.stack([keys.amin(1), keys.amax(1)], 1)).view(torch.uint8)
            continue
        use = filled[start : start + _PAGES_AT_ONCE, None]
        # What was never written may be NaN: the first key stands in for it.
        there = (torch.arange(size, device=pages.device) < use)[..., None]
        keys = torch.where(there, keys, keys[:, :1])
        found = as_bounds(torch.stack([keys.amin(1), keys.amax(1)], 1)).view(torch.uint8)
        raw[some] = torch.where(use[..., None] > 0, found, raw[some])


def _grow(bounds: torch.Tensor, cache: LayerCache, slot: int, first: bool) -> None:
    """Let a token's key into the bounds of its page; the first key of a page replaces what was there."""
    key = read(cache, torch.tensor([slot], device=bounds.device))[0][0].float()
    page = slot // cache.geometry.page_size
    low, high = (key, key) if first else bounds[page].float()
    grown = as_bounds(torch.stack([torch.minimum(low, key), torch.maximum(high, key)]))
    bounds.view(torch.uint8)[page] = grown.view(torch.uint8)


def page_scores(
    scores: torch.Tensor,
    bounds: torch.Tensor,
    rows: DecodeRows,
    cache: LayerCache,
    queries: torch.Tensor,
    want: int,
    reduce: Literal["sum", "max"] = "sum",
    pins: torch.Tensor | None = None,
) -> None:
    """Let the newest tokens' keys into the bounds of their pages, and score the pages before those: over a group's
    query heads, the sum or the largest of the products of the query with the middle of a page's bounds, and of its
    absolute value with half their width, of which the share `rows.thresholds` counts: with 1 no product with a key of
    the page can be greater. They aren't multiplied with the softmax scale. The newest token's page has no score, it is
    always read.

    Args:
        scores: float32 [num_kv_heads, pages]; of wanted rows, those from `rows.starts // page_size` on are written. A
            score that isn't a number is stored as infinity.
        bounds: see `page_bounds`; a page's grow with its tokens if this is called in every step, for all modes.
        queries: [n, num_kv_heads, group, head_dim].
        want: set of `Mode`s.
        pins: uint8 [states, num_kv_heads, bytes], which pages of each state come before all others: page p's bit is
            bit p % 8 of byte p // 8. Rows in no state have none.
    """
    sequences, newest, real = Sequences.of(rows, cache), newest_slots(rows, cache), real_queries(cache, queries)
    for row, head in wanted_heads(rows, cache, want):
        used, rest = divmod(int(sequences.lengths[row, head]) - 1, sequences.page_size)
        _grow(bounds, cache, int(newest[row, head]), rest == 0)
        own = bounds.view(torch.uint8)[sequences.pages[row, head, :used]].view(BOUNDS)
        low, high = own.float().unbind(1)
        query, spread = real[row, head], rows.thresholds[row]
        # With a spread of 1 the larger of q * low and q * high, in each dimension.
        each = (query + spread * query.abs()) / 2 @ high.T + (query - spread * query.abs()) / 2 @ low.T
        found = nan_first(each.sum(0) if reduce == "sum" else each.amax(0))
        if pins is not None and rows.places[row] >= 0:
            page = torch.arange(used, device=pins.device)
            pinned = pins[rows.places[row], head][page // 8] >> (page % 8) & 1
            found = found.masked_fill(pinned.bool(), float("inf"))
        start = int(rows.starts[row]) // sequences.page_size
        scores[head, start : start + used] = found
