"""`Chunk.ops` as Triton kernels, for chunks whose keys lie in pages: what `attention_plugins.prefill.plain` has, under
the same names."""

from attention_plugins.kernels.prefill.antidiagonals import antidiagonal_masses
from attention_plugins.kernels.prefill.choose import count_to_reach, cover
from attention_plugins.kernels.prefill.drawing import block_plan, block_stripes, group_plan, token_stripes
from attention_plugins.kernels.prefill.pools import block_logits, pooled_keys, pooled_queries
from attention_plugins.kernels.prefill.reach import group_slack, near_maxima
from attention_plugins.kernels.prefill.rows import column_sums, last_row_sums
from attention_plugins.kernels.prefill.search import best_of_chunks
from attention_plugins.kernels.prefill.top import top

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
