"""Whether vLLM's block pool and our manager agree: every block that is used is owned, and none is lost.

For `--kv-audit`, soak tests and model-based tests. Works on stock vLLM's managers too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from kvcache.audit import AuditError, Owned
from kvcache.vllm_adapter.manager import CompressibleAttentionManager


class BlockAudit:
    """Checks between two steps of a scheduler.

    Attributes:
        checks: how many there were.
        peak: most blocks that were in use.
        others: blocks that somebody else has taken out of the pool.
    """

    def __init__(self, cache: KVCacheManager) -> None:
        self.pool = cache.block_pool
        self.managers = cache.coordinator.single_type_managers
        ours = [manager for manager in self.managers if isinstance(manager, CompressibleAttentionManager)]
        self.ours = ours[0] if ours else None
        self.checks = self.peak = 0
        self.others: list[KVCacheBlock] = []

    @property
    def used(self) -> int:
        """Blocks in use."""
        return int(self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks())

    def check(self, live: Container[str]) -> None:
        """The whole pool.

        Args:
            live: ids of the requests that haven't ended.

        Raises:
            AuditError: blocks that are used and not owned, owned and not used, shared without a hash, or of a request
                that has ended; a free queue or a prefix cache that isn't whole.
        """
        owners = Counter(block.block_id for block in self.others)
        for manager in self.managers:
            for name, blocks in manager.req_to_blocks.items():
                if blocks and name not in live:
                    raise AuditError(f"{name} has ended and holds {len(blocks)} blocks")
                owners.update(block.block_id for block in blocks if not block.is_null)
            if gone := [name for name in manager.num_cached_block if name not in live]:
                raise AuditError(f"{gone} have ended, and their cached blocks are still counted")
        self._check_targets(live, owners)
        self._check_references(owners)
        self._check_free_queue(owners)
        self.checks, self.peak = self.checks + 1, max(self.peak, len(owners))

    def _check_targets(self, live: Container[str], owners: Counter[int]) -> None:
        if self.ours is None:
            return
        for known in (self.ours.plans, self.ours.target_blocks, self.ours.later, self.ours.own_answers):
            if gone := [name for name in known if name not in live]:
                raise AuditError(f"{gone} have ended, and their plans are still there")
        for name, blocks in self.ours.target_blocks.items():
            if name not in self.ours.req_to_blocks:
                raise AuditError(f"{name} has target blocks and no others")
            owners.update(block.block_id for block in blocks)
            for block in blocks:
                if block.is_null or owners[block.block_id] != 1 or block.block_hash is not None:
                    raise AuditError(f"{name}: target block {block} is shared, or others may find it")

    def _check_references(self, owners: Counter[int]) -> None:
        cached = self.pool.cached_block_hash_to_block
        for block in self.pool.blocks:
            if block.is_null:
                continue
            if block.ref_cnt != owners[block.block_id]:
                raise AuditError(f"{block} has {owners[block.block_id]} owners and {block.ref_cnt} references")
            if block.block_hash is None:
                if block.ref_cnt > 1:
                    raise AuditError(f"{block} is shared, and not by its hash")
            elif not cached.contain(block.block_hash, block.block_id):
                raise AuditError(f"{block} has a hash that the prefix cache doesn't know")

    def _check_free_queue(self, owners: Counter[int]) -> None:
        queue = self.pool.free_block_queue
        before, block, free = queue.fake_free_list_head, queue.fake_free_list_head.next_free_block, 0
        while block is not queue.fake_free_list_tail:
            if block is None or block.prev_free_block is not before or free > self.pool.num_gpu_blocks:
                raise AuditError(f"the queue of free blocks is broken behind {before}")
            if block.ref_cnt or block.is_null:
                raise AuditError(f"{block} is in the queue of free blocks")
            before, block, free = block, block.next_free_block, free + 1
        used = self.pool.num_gpu_blocks - 1 - queue.num_free_blocks
        owned = sum(1 for count in owners.values() if count)
        if free != queue.num_free_blocks or used != owned:
            raise AuditError(f"{used} blocks in use, {owned} owned; {free} in the free queue")

    def check_scheduled(self, request: Request, boundary: int) -> Owned:
        """One request that has just been scheduled; what it owns, in words for workers.

        Args:
            boundary: tokens computed at its last compaction, this step's included; 0: there was none.

        Raises:
            AuditError: it holds more or less than its plan says, or what it must not share has a hash.
        """
        assert self.ours is not None
        name, page = request.request_id, self.ours.block_size
        blocks, plan = self.ours.req_to_blocks[name], self.ours.plans.get(name)
        targets = self.ours.target_blocks.get(name, [])
        # vLLM releases before it allocates, on the tokens of the steps that have come back by then.
        processed = max(0, request.num_computed_tokens - request.num_in_flight_tokens)
        released = plan.last_boundary(processed - 1) // page if plan else 0
        if [block.is_null for block in blocks] != [number < released for number in range(len(blocks))]:
            raise AuditError(f"{name}: of {blocks} the first {released} should have been released, {processed} tokens")
        if len(blocks) != -(-request.num_computed_tokens // page):
            raise AuditError(f"{name}: {len(blocks)} blocks for {request.num_computed_tokens} tokens")
        waits = plan is None or (name in self.ours.later and request.num_computed_tokens <= plan.prompt_len)
        if len(targets) != (0 if waits or plan is None else plan.kept_pages):
            raise AuditError(f"{name}: {len(targets)} target blocks, the plan is {plan}, waits: {waits}")
        shareable = self.ours.shareable(name)
        if shareable is not None and any(block.block_hash is not None for block in blocks[shareable // page :]):
            raise AuditError(f"{name}: tokens behind {shareable} can be found by others")
        kept = plan.kept_pages * page if plan and boundary else 0
        ids = [block.block_id for block in blocks]
        return Owned(ids, [block.block_id for block in targets], boundary, kept)
