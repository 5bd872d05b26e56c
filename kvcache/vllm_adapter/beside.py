"""The cache of hybrid models' other layers: sliding-window, chunked and linear ones, whose groups stay vLLM's.

vLLM puts a model's layers into groups of one kind, gives each group a manager and a block table, and lets all draw
blocks from one pool. Only the group of the full-attention layers is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator, replay_boundaries
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from kvcache.vllm_adapter.manager import CompressibleAttentionManager

Sharing = Callable[[Request], tuple[int | None, int | None]]
"""How many of a request's tokens others may share (None: all), and where a hit of the same request would end (None: the
request isn't compacted)."""
USUAL_WINDOW = 64
"""Last tokens that a policy may want to watch: a hit of the same prompt, compacted, ends before them."""


def compressible_manager(coordinator: KVCacheCoordinator) -> CompressibleAttentionManager:
    """The manager of the full-attention layers.

    Raises:
        ValueError: there is none, or several.
    """
    managers = coordinator.single_type_managers
    found = [manager for manager in managers if isinstance(manager, CompressibleAttentionManager)]
    if len(found) != 1:
        names = ", ".join(type(manager).__name__ for manager in managers)
        raise ValueError(
            f"KV compression needs a model whose full-attention layers are one KV cache group; got {names}. "
            "Serve this model with `vllm serve`."
        )
    return found[0]


class LayersBeside:
    """What the groups beside ours hold of a request, and what of it may be shared."""

    def __init__(self, coordinator: KVCacheCoordinator, ours: CompressibleAttentionManager) -> None:
        groups = zip(coordinator.single_type_managers, coordinator.kv_cache_config.kv_cache_groups, strict=True)
        others = [(manager, group) for manager, group in groups if manager is not ours]
        self.coordinator, self.managers = coordinator, [manager for manager, _ in others]
        self.num_layers = sum(len(group.layer_names) for _, group in others)

    def blocks(self, tokens: int) -> int:
        """Blocks that they hold of a request once this many tokens have been computed."""
        held = 0
        for manager in self.managers:
            skipped = max(0, manager.get_num_skipped_tokens(tokens))
            held += -(-tokens // manager.block_size) - skipped // manager.block_size
        return held

    def most_blocks(self, tokens: int) -> int:
        """Blocks that they hold of a request of this many tokens at once, at most: what vLLM's admission counts."""
        most = 0
        for manager in self.managers:
            needed, cap = -(-tokens // manager.block_size), manager.max_admission_blocks_per_request
            most += needed if cap is None else min(needed, cap)
        return most

    def share(self, sharing: Sharing) -> None:
        """Say what the prefix cache takes of requests, where there are such groups; vLLM asks its coordinator.

        What their layers compute after a compaction comes from full-attention layers that saw less than the tokens'
        hashes say, so it is kept out as in our group: a hit needs all groups, but a request that isn't compacted may
        fill ours under the same hashes. And of layers that slide vLLM keeps only what a hit needs that ends with the
        prompt, while a hit of a compacted request ends before its observation window.
        """
        if not self.managers:
            return
        coordinator = self.coordinator

        def cache_blocks(request: Request, num_computed_tokens: int) -> None:
            most, end = sharing(request)
            tokens = num_computed_tokens if most is None else min(num_computed_tokens, most)
            eagle = bool(coordinator.eagle_group_ids)
            ends = replay_boundaries(request.num_prompt_tokens, coordinator.scheduler_block_size, eagle)
            ends = (*ends, max(0, request.num_prompt_tokens - USUAL_WINDOW if end is None else end))
            for group, manager in enumerate(coordinator.single_type_managers):
                if manager.enable_caching:
                    manager.cache_blocks(
                        request,
                        coordinator.get_num_cacheable_tokens(tokens, group),
                        retention_interval=coordinator.retention_interval,
                        replay_boundaries=ends,
                    )

        coordinator.cache_blocks = cache_blocks


def pool_block_bytes(config: KVCacheConfig) -> int:
    """Memory of one block of the pool: groups lie over each other, so it is as large as the largest group's."""

    def group_bytes(group: Any) -> int:
        return int(group.kv_cache_spec.page_size_bytes) * len(group.layer_names)

    return max(map(group_bytes, config.kv_cache_groups))
