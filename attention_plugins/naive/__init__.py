"""What selectors are made of, in plain torch: the twins of `attention_plugins.kernels`, under the same names.

`paged_attention` is the twin of a platform's own kernel.
"""

from attention_plugins.naive.bounds import grow_bounds, page_bounds, write_bounds
from attention_plugins.naive.full_rows import full_rows
from attention_plugins.naive.newest import newest_slots
from attention_plugins.naive.page_scores import page_scores
from attention_plugins.naive.place_slots import place_slots
from attention_plugins.naive.recycle import append_newest, evict_least
from attention_plugins.naive.slot_attention import slot_attention
from attention_plugins.naive.token_scores import token_scores
from attention_plugins.naive.top_pages import top_pages
from attention_plugins.naive.top_slots import top_slots

__all__ = [
    "append_newest",
    "evict_least",
    "full_rows",
    "grow_bounds",
    "newest_slots",
    "page_bounds",
    "page_scores",
    "place_slots",
    "slot_attention",
    "token_scores",
    "top_pages",
    "top_slots",
    "write_bounds",
]
