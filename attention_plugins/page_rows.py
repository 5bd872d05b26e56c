"""A layer's page tables as attention kernels want them: one row per (request, KV head). The naive twin."""

from __future__ import annotations

import torch

from kvcache.tables import PageTables


def page_rows(
    tables: PageTables,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    only: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All layers' rows. `attention_plugins.kernels.page_rows` does one layer at a time, into given tensors.

    Args:
        tables: the compacted requests' tables.
        slots: int32 [n], each request's table, or -1 for one that isn't compacted: its rows are empty.
        seq_lens: int32 [n], logical lengths.
        block_table: int32 [n, blocks], vLLM's: block ids by logical block number.
        only: the one layer that is wanted; num_layers is 1 in what comes back.

    Returns:
        pages: int32 [num_layers, n * num_kv_heads, width]; entries behind a row's pages are 0.
        lengths: int32 [num_layers, n * num_kv_heads], slots in use.
    """
    g, device = tables.geometry, tables.blocks.device
    layers = slice(None) if only is None else slice(only, only + 1)
    slot = slots.clamp(min=0).long()
    here = (slots >= 0)[:, None, None, None]
    first = tables.first_block[slot].long()[:, None, None]
    counts, starts = tables.counts[slot, layers].long(), tables.starts[slot, layers].long()  # [n, layers, heads]
    tail = seq_lens.long()[:, None, None] - first * g.page_size
    lengths = torch.where(here[..., 0], counts * g.page_size + tail, 0)
    total = counts + -(-tail // g.page_size)
    width = int(torch.where(here[..., 0], total, 0).max()) if len(slots) else 0

    column = torch.arange(width, device=device)
    n = tables.num_blocks[slot].long()[:, None, None, None]
    index = (starts[..., None] + column).clamp(max=n * g.num_layers * g.num_kv_heads - 1)
    layer, head, block = index // (n * g.num_kv_heads), index // n % g.num_kv_heads, index % n
    block = tables.blocks[slot].long()[:, None, None].expand(*index.shape[:-1], -1).gather(-1, block)
    kept = tables.layer_base[layer] + block * g.block_stride + head

    later = first[..., None] + column - counts[..., None]
    later = later.clamp(0, block_table.shape[1] - 1)
    later = block_table.long()[:, None, None].expand(*index.shape[:-1], -1).gather(-1, later)
    heads = torch.arange(g.num_kv_heads, device=device)[:, None]
    appended = tables.layer_base[layers, None, None] + later * g.block_stride + heads

    pages = torch.where(column < counts[..., None], kept, appended)
    pages = torch.where(here & (column < total[..., None]), pages, 0)
    return (
        pages.transpose(0, 1).flatten(1, 2).int().contiguous(),
        lengths.transpose(0, 1).flatten(1, 2).int().contiguous(),
    )
