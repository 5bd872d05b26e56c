"""vLLM's block bookkeeping for requests whose cache shrinks after the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, register_all_kvcache_specs
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from kvcache.plan import RetentionPlan


@dataclass(frozen=True, kw_only=True)
class CompressibleAttentionSpec(FullAttentionSpec):
    """Full attention whose pages may be re-assigned after the prompt; the same memory layout."""


def compressible(spec: AttentionSpec) -> AttentionSpec:
    """The same spec, marked as ours; other kinds of attention are returned as they are, and stay vLLM's."""
    if type(spec) is not FullAttentionSpec or spec.sliding_window or spec.attention_chunk_size:
        return spec
    return CompressibleAttentionSpec(**{field.name: getattr(spec, field.name) for field in fields(spec)})


class CompressibleAttentionManager(FullAttentionManager):
    """Blocks of a request with a plan: its prompt's, plus target blocks, less the prompt's once it is compacted.

    The block list stays indexed by logical position, so vLLM's slot mapping, hashes and lengths hold unchanged.
    Target blocks are reserved together with the prompt's first blocks: a request that was admitted can always be
    compacted. Where the answer has to grow first, they come with the step that compacts, and others may be preempted
    for them. The full blocks that a compaction read are released, hashes intact, when its step is done.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: dict[str, RetentionPlan] = {}
        self.target_blocks: dict[str, list[KVCacheBlock]] = {}
        self.later: set[str] = set()
        self.own_answers: dict[str, int] = {}
        """Prompts' lengths of requests whose answers are never shared: their tokens saw a part of what is before."""

    def set_plan(self, request_id: str, plan: RetentionPlan, prompt_len: int) -> None:
        """From now on this request will be compacted. To be called before its first blocks are allocated."""
        self.plans[request_id] = plan
        if plan.prompt_len > prompt_len:
            self.later.add(request_id)

    def drop_plan(self, request_id: str) -> None:
        self.plans.pop(request_id, None)
        self.later.discard(request_id)
        self.own_answers.pop(request_id, None)

    def shareable(self, request_id: str) -> int | None:
        """How many of its tokens other requests may share; None: all. Behind them, tokens saw less than their hashes
        say: those after a compaction, and selectors' answers."""
        plan, prompt_len = self.plans.get(request_id), self.own_answers.get(request_id)
        known = [most for most in (plan.prompt_len if plan else None, prompt_len) if most is not None]
        return min(known, default=None)

    def _missing_targets(self, request_id: str, num_tokens: int) -> int:
        plan = self.plans.get(request_id)
        if plan is None or request_id in self.target_blocks:
            return 0
        return 0 if request_id in self.later and num_tokens <= plan.prompt_len else plan.kept_pages

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        blocks = super().get_num_blocks_to_allocate(request_id, num_tokens, *args, **kwargs)
        return blocks + self._missing_targets(request_id, num_tokens)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        if missing := self._missing_targets(request_id, num_tokens):
            self.target_blocks[request_id] = self.block_pool.get_new_blocks(missing)
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        if (most := self.shareable(request.request_id)) is not None:
            num_tokens = min(num_tokens, most)
        super().cache_blocks(request, num_tokens, retention_interval, replay_boundaries=replay_boundaries)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Release the full blocks below a boundary once a token behind it has been processed.

        `processed_computed_tokens` leaves out steps in flight, so the compaction, which runs at the start of the
        step that computes the first such token, has been executed.
        """
        super().remove_skipped_blocks(request_id, processed_computed_tokens, num_prompt_tokens)
        if plan := self.plans.get(request_id):
            boundary = plan.last_boundary(processed_computed_tokens - 1)
            self._remove_blocks_in_range(request_id, 0, boundary // plan.page_size)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        return super().pop_blocks_for_free(request_id) + self.target_blocks.pop(request_id, [])


def register_spec() -> None:
    """Bind our spec to our manager; may be called any number of times in any process."""
    # The registry fills itself with vLLM's own specs only while it is empty.
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(
        CompressibleAttentionSpec, CompressibleAttentionManager, uniform_type_base_spec=FullAttentionSpec
    )
