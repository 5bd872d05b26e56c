"""A batch of compacted requests as attention sees it: each (request, KV head) is a sequence of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvcache.pages import PageTable


@dataclass(frozen=True)
class CompactedRow:
    """One compacted request of a batch.

    Attributes:
        first_token: its first query token's row in the batch.
        num_tokens: its query tokens in this step.
        length: its logical length, this step's tokens included.
        table: its pages, already holding this step's blocks.
    """

    first_token: int
    num_tokens: int
    length: int
    table: PageTable


@dataclass(frozen=True)
class CompactedBatch:
    """The paged-attention problem of all compacted requests in a step, on the cache's device.

    Attributes:
        token_heads: int64 [sequences' tokens]; places in the batch's queries seen as [tokens * num_kv_heads, ...],
            sequence by sequence.
        query_start: int32 [sequences + 1].
        lengths: int32 [num_layers, sequences]: physical lengths.
        pages: int32 [num_layers, sequences, width].
        max_query_len: longest sequence of queries.
        max_length: longest physical length.
    """

    token_heads: torch.Tensor
    query_start: torch.Tensor
    lengths: torch.Tensor
    pages: torch.Tensor
    max_query_len: int
    max_length: int


def plan_compacted(rows: list[CompactedRow], num_kv_heads: int) -> CompactedBatch:
    """Lay out the sequences: request by request, KV head by KV head. All tables lie in one store."""
    store = rows[0].table.store
    slots = torch.tensor([row.table.slot for row in rows])
    query_lens = torch.tensor([row.num_tokens for row in rows])
    logical = torch.tensor([row.length for row in rows], dtype=torch.int32)
    lengths = (store.offsets[:, slots] + logical[:, None]).flatten(1)
    width = max(row.table.width for row in rows)
    device = store.pages.device
    pages = store.pages[..., :width].index_select(1, slots.to(device)).flatten(1, 2)
    query_start = torch.zeros(len(rows) * num_kv_heads + 1, dtype=torch.int32)
    torch.cumsum(query_lens.repeat_interleave(num_kv_heads), 0, out=query_start[1:])
    most = int(query_lens.max())
    first = torch.tensor([row.first_token for row in rows])
    token = first[:, None, None] + torch.arange(most)
    place = token * num_kv_heads + torch.arange(num_kv_heads)[:, None]
    real = (torch.arange(most) < query_lens[:, None])[:, None].expand_as(place)
    return CompactedBatch(
        place[real].to(device), query_start.to(device), lengths.to(device), pages, most, int(lengths.max())
    )
