"""Triton kernels; each computes what a naive twin in torch computes, which runs where there is no GPU."""

from attention_plugins.kernels.attention import page_attention, slot_attention
from attention_plugins.kernels.newest import newest_slots
from attention_plugins.kernels.page_lists import page_lists
from attention_plugins.kernels.page_rows import full_rows
from attention_plugins.kernels.places import place_slots
from attention_plugins.kernels.quest import page_scores
from attention_plugins.kernels.recycle import append_newest, evict_least
from attention_plugins.kernels.scores import add_heads, pool_scores, token_scores
from attention_plugins.kernels.top import top_pages, top_slots
from attention_plugins.naive.quest import page_bounds, write_bounds

__all__ = [
    "add_heads",
    "append_newest",
    "evict_least",
    "full_rows",
    "newest_slots",
    "page_attention",
    "page_bounds",
    "page_lists",
    "page_scores",
    "place_slots",
    "pool_scores",
    "slot_attention",
    "token_scores",
    "top_pages",
    "top_slots",
    "write_bounds",
]
