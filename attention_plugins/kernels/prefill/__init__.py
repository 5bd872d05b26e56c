"""`Chunk.ops` as Triton kernels, for chunks whose keys lie in pages: what `attention_plugins.prefill.plain` has, under
the same names."""

from attention_plugins.kernels.prefill.antidiagonals import antidiagonal_masses
from attention_plugins.kernels.prefill.choose import count_to_reach, cover, top
from attention_plugins.kernels.prefill.drawing import block_plan, block_stripes, token_stripes
from attention_plugins.kernels.prefill.pools import block_logits, pooled_keys, pooled_queries
from attention_plugins.kernels.prefill.rows import column_sums, last_row_sums

__all__ = [
    "antidiagonal_masses",
    "block_logits",
    "block_plan",
    "block_stripes",
    "column_sums",
    "count_to_reach",
    "cover",
    "last_row_sums",
    "pooled_keys",
    "pooled_queries",
    "token_stripes",
    "top",
]
