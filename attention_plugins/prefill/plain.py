"""What patterns are made of, in plain torch: `Chunk.ops` by default, and the twins of
`attention_plugins.kernels.prefill`, under the same names."""

from attention_plugins.prefill.antidiagonals import antidiagonal_masses
from attention_plugins.prefill.choose import count_to_reach, cover, top
from attention_plugins.prefill.drawing import block_plan, block_stripes, group_plan, token_stripes
from attention_plugins.prefill.reach import group_slack, near_maxima
from attention_plugins.prefill.scores import (
    block_logits,
    column_sums,
    last_row_sums,
    pooled_keys,
    pooled_queries,
)
from attention_plugins.prefill.search import best_of_chunks

__all__ = [
    "antidiagonal_masses",
    "best_of_chunks",
    "block_logits",
    "block_plan",
    "block_stripes",
    "column_sums",
    "count_to_reach",
    "cover",
    "group_plan",
    "group_slack",
    "last_row_sums",
    "near_maxima",
    "pooled_keys",
    "pooled_queries",
    "token_stripes",
    "top",
]
