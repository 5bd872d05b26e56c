"""Whether a worker's page tables are what the scheduler believes: for soak and model-based tests. Knows no vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from kvcache.compressor import Compressor


class AuditError(RuntimeError):
    """The cache's bookkeeping contradicts itself: a bug, never a request's fault. No answer may leave after it."""


@dataclass(frozen=True)
class Owned:
    """What a scheduled request owns, as the scheduler has it.

    Attributes:
        blocks: its block ids by logical number; 0, vLLM's null block, for those that were released.
        targets: its target blocks.
        boundary: tokens computed at its last compaction; 0: there was none.
        kept_tokens: per layer and KV head on average, whole pages; 0 before the first compaction.
    """

    blocks: list[int]
    targets: list[int]
    boundary: int = 0
    kept_tokens: int = 0


def audit_tables(compressor: Compressor, owned: Mapping[str, Owned]) -> None:
    """Check every page table against the others, and those of these requests against what they own. Waits for the GPU.

    Raises:
        AuditError: names the request and what is wrong.
    """
    tables = compressor.tables
    slots = {name: request.slot for name, request in compressor.requests.items() if request.slot is not None}
    taken = [*slots.values(), *tables._free]
    if sorted(taken) != list(range(tables.identity)):
        raise AuditError(f"page tables in use {slots} and free {tables._free} aren't each of {tables.identity} once")
    numbers, targets, first = tables.num_blocks.tolist(), tables.blocks.tolist(), tables.first_block.tolist()
    counts, starts = tables.counts.flatten(1).long(), tables.starts.flatten(1).long()
    owner: dict[int, str] = {}
    for name, slot in slots.items():
        held = targets[slot][: numbers[slot]]
        for block in held:
            if block in owner:
                raise AuditError(f"block {block} is in the page tables of {name} and of {owner[block]}")
            owner[block] = name
        pool = len(held) * counts.shape[1]
        ends = counts[slot].cumsum(0)
        if int(ends[-1]) != pool or not torch.equal(ends - counts[slot], starts[slot]):
            raise AuditError(f"{name}: its {pool} pages aren't handed out once each: {counts[slot].tolist()}")
        known = compressor.requests[name].counts
        if known is None or not torch.equal(known.flatten(), counts[slot].cpu()):
            raise AuditError(f"{name}: its page counts and those of its table differ")
        if (told := owned.get(name)) is not None:
            _audit_table(name, told, held, first[slot], tables.geometry.page_size)
    for name, told in owned.items():
        if told.boundary and name not in slots:
            raise AuditError(f"{name} was compacted at {told.boundary}, and has no page table")


def _audit_table(name: str, told: Owned, held: Sequence[int], first_block: int, page_size: int) -> None:
    if list(held) != told.targets:
        raise AuditError(f"{name}: its page table has the target blocks {list(held)}, it owns {told.targets}")
    if first_block != told.boundary // page_size:
        raise AuditError(f"{name}: compacted at {told.boundary}, its table goes on with block {first_block}")
    if len(held) * page_size != told.kept_tokens:
        raise AuditError(f"{name}: {len(held) * page_size} compacted tokens per head, {told.kept_tokens} are planned")
    if not all(told.blocks[first_block:]):
        raise AuditError(f"{name}: a block behind {told.boundary} was released: {told.blocks}")


def audit_rows(names: Sequence[str], block_table: torch.Tensor, owned: Mapping[str, Owned]) -> None:
    """Check that the rows of a batch's block table are the blocks that the requests own. Waits for the GPU.

    Args:
        names: of the rows, in order.
        block_table: int32 [rows, blocks], a worker's.

    Raises:
        AuditError: as above.
    """
    for row, name in enumerate(names):
        if (told := owned.get(name)) is None:
            continue
        found = block_table[row, : len(told.blocks)].tolist()
        wrong = [number for number, (one, own) in enumerate(zip(found, told.blocks, strict=True)) if own and one != own]
        if wrong:
            raise AuditError(f"{name}: its blocks {wrong} are {found} in the batch, it owns {told.blocks}")
