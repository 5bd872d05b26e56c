"""A batch of compacted requests as attention sees it: each (request, KV head) is a sequence of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kvcache.tables import to_device


@dataclass(frozen=True)
class CompactedBatch:
    """The paged-attention problem of compacted requests in a step, on the cache's device.

    Attributes:
        slots: int32 [n], each request's page table; -1 for a row of a CUDA graph that isn't compacted.
        seq_lens: int32 [n], logical lengths, this step's tokens included.
        block_table: int32 [n, blocks], vLLM's.
        query_start: int32 [n * num_kv_heads + 1].
        max_query_len: longest sequence of queries.
        token_heads: int64 [sequences' tokens]; places in the batch's queries seen as [tokens * num_kv_heads, ...],
            sequence by sequence. None where these are all of the batch's queries, in order.
    """

    slots: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    query_start: torch.Tensor
    max_query_len: int
    token_heads: torch.Tensor | None


def plan_compacted(
    slots: np.ndarray,
    query_start: np.ndarray,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    num_kv_heads: int,
) -> CompactedBatch:
    """Lay out the sequences of a batch's compacted rows: request by request, KV head by KV head.

    Args:
        slots: int32 [rows], -1 for rows that aren't compacted; at least one is.
        query_start: int [rows + 1], first query token of each row.
        seq_lens: int32 [rows], logical lengths, on the cache's device.
        block_table: int32 [rows, blocks], on the cache's device.
    """
    device = seq_lens.device
    rows = torch.from_numpy(np.flatnonzero(slots >= 0))
    first = torch.from_numpy(query_start[:-1].astype(np.int64))[rows]
    query_lens = torch.from_numpy(np.diff(query_start).astype(np.int64))[rows]
    starts = torch.zeros(len(rows) * num_kv_heads + 1, dtype=torch.int32)
    torch.cumsum(query_lens.repeat_interleave(num_kv_heads), 0, out=starts[1:])
    most = int(query_lens.max())
    token = first[:, None, None] + torch.arange(most)
    place = token * num_kv_heads + torch.arange(num_kv_heads)[:, None]
    real = (torch.arange(most) < query_lens[:, None])[:, None].expand_as(place)
    at = to_device(rows, device)
    return CompactedBatch(
        slots=to_device(torch.from_numpy(slots)[rows], device),
        seq_lens=seq_lens[at],
        block_table=block_table[at],
        query_start=to_device(starts, device),
        max_query_len=most,
        token_heads=to_device(place[real], device),
    )
