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
    """Lay out the sequences: request by request, KV head by KV head."""
    heads = torch.arange(num_kv_heads)
    token_heads, lengths, tables, query_lens = [], [], [], []
    for row in rows:
        tokens = torch.arange(row.first_token, row.first_token + row.num_tokens)
        token_heads.append((tokens[None, :] * num_kv_heads + heads[:, None]).flatten())
        lengths.append(row.table.physical_lengths(row.length))
        tables.append(row.table.rows())
        query_lens += [row.num_tokens] * num_kv_heads
    width = max(table.shape[-1] for table in tables)
    device = tables[0].device
    pages = torch.zeros(len(tables[0]), len(query_lens), width, dtype=torch.int32, device=device)
    for i, table in enumerate(tables):
        pages[:, i * num_kv_heads : (i + 1) * num_kv_heads, : table.shape[-1]] = table
    start = torch.zeros(len(query_lens) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(query_lens), 0, out=start[1:])
    physical = torch.cat(lengths, 1)
    return CompactedBatch(
        torch.cat(token_heads).to(device),
        start.to(device),
        physical.to(device),
        pages,
        max(query_lens),
        int(physical.max()),
    )
