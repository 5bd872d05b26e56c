"""What selectors are made of, in plain torch: the twins of `attention_plugins.kernels`, under the same names.

`paged_attention` is the twin of a platform's own kernel.
"""

from attention_plugins.naive.attention import page_attention, slot_attention
from attention_plugins.naive.newest import newest_slots
from attention_plugins.naive.page_lists import page_lists
from attention_plugins.naive.places import place_slots
from attention_plugins.naive.quest import page_bounds, page_scores, write_bounds
from attention_plugins.naive.recycle import append_newest, evict_least
from attention_plugins.naive.rows import full_rows
from attention_plugins.naive.scores import add_heads, pool_scores, token_scores
from attention_plugins.naive.top import top_pages, top_slots

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
