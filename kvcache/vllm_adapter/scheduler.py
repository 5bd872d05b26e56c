"""vLLM's scheduler with compression: plans requests, orders compactions, reports what was kept."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from attention_plugins.decode.registry import FIELD, make_selector, selector_words
from attention_plugins.decode.schedule import Prepare, ReadSchedule
from attention_plugins.decode.settings import DecodeSettings, score_capacity
from attention_plugins.prefill.base import Pattern
from attention_plugins.prefill.grid import ROWS
from attention_plugins.prefill.orders import PatternReport, StartPattern, aligned, applies
from attention_plugins.prefill.registry import FIELD as PREFILL_FIELD
from attention_plugins.prefill.registry import make_pattern, pattern_words
from attention_plugins.prefill.usage import PrefillTotals, prefill_usage
from kvcache.kept_positions import bin_width, wanted
from kvcache.orders import Compact, CompactionReport, Start
from kvcache.plan import RetentionPlan
from kvcache.policies.base import Policy
from kvcache.registry import make_policy, policy_words
from kvcache.usage import POOL, CompressionTotals, kv_cache_usage, pool_blocks
from kvcache.vllm_adapter.audit import BlockAudit
from kvcache.vllm_adapter.beside import LayersBeside, compressible_manager, pool_block_bytes
from kvcache.vllm_adapter.manager import register_spec
from kvcache.vllm_adapter.orders import StepOrders, attach_orders, reports_of

register_spec()
logger = init_logger(__name__)

EXTRA_ARG = "kv_cache"
"""Where a request's policy stands in `SamplingParams.extra_args`, and its usage in `kv_transfer_params`."""


@dataclass
class _Prefill:
    """A request whose prompt has a pattern, and what was told of it."""

    pattern: Pattern
    planned: bool
    """Whether the prompt is long enough for it."""
    report: PatternReport | None = None


@dataclass
class _Compression:
    """Scheduler's view of one request."""

    policy: Policy | None
    plan: RetentionPlan | None
    reason: str | None = None
    """Why the request isn't compressed although its policy would."""
    boundary: int = 0
    report: CompactionReport | None = None
    tells_positions: bool = False


class _CompressionMixin(Scheduler if TYPE_CHECKING else object):  # type: ignore[misc]
    """Everything that differs from vLLM's scheduler; four small hooks and the orders of each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        coordinator = self.kv_cache_manager.coordinator
        self.kv_blocks = compressible_manager(coordinator)
        self.beside = LayersBeside(coordinator, self.kv_blocks)
        self.beside.share(lambda request: (self.kv_blocks.shareable(request.request_id), self._hit_limit(request)))
        # Of all GPUs together: a block of the scheduler's is one on each.
        self.block_bytes = pool_block_bytes(self.kv_cache_config)
        self.block_bytes *= self.vllm_config.parallel_config.tensor_parallel_size
        self.compressions: dict[str, _Compression] = {}
        self.compression_totals = CompressionTotals()
        self.prefills: dict[str, _Prefill] = {}
        self.prefill_totals = PrefillTotals()
        groups = zip(coordinator.single_type_managers, self.kv_cache_config.kv_cache_groups, strict=True)
        (self.num_layers,) = (len(group.layer_names) for manager, group in groups if manager is self.kv_blocks)
        self.decode_settings = DecodeSettings.of(self.vllm_config.additional_config)
        page_size = self.kv_blocks.block_size
        capacity = score_capacity(self.kv_cache_config.num_blocks, page_size, self.max_model_len)
        self.reads = ReadSchedule(states=self.decode_settings.states, capacity=capacity, page_size=page_size)
        self.audit_every = int((self.vllm_config.additional_config or {}).get("longreach", {}).get("audit", 0))
        self.audit = BlockAudit(self.kv_cache_manager)

    def add_request(self, request: Request) -> None:
        if request.request_id not in self.requests:
            self._plan(request)
            self._plan_prefill(request)
        super().add_request(request)

    def _plan(self, request: Request) -> None:
        params = request.sampling_params
        words = (params.extra_args or {}).get(EXTRA_ARG) if params else None
        policy = make_policy(words) if words else None
        plan, reason = None, None
        # Streaming-input sessions extend their prompt later, so it has no end to compact at.
        if policy and not request.resumable:
            plan = policy.plan(request.num_prompt_tokens, self.kv_blocks.block_size)
            if plan and request.num_prompt_tokens + request.max_tokens <= plan.prompt_len:
                plan = None  # the answer can't grow as far
        if plan and (reason := self._too_large(request, plan)):
            logger.warning("request %s: %s", request.request_id, reason)
            plan = None
        tells = bool(plan and words and wanted(words))
        self.compressions[request.request_id] = _Compression(policy, plan, reason, tells_positions=tells)
        if plan:
            self.kv_blocks.set_plan(request.request_id, plan, request.num_prompt_tokens)
        words = (params.extra_args or {}).get(FIELD) if params else None
        selector = make_selector(words) if words else None
        if selector and selector.name not in self.decode_settings.selectors:  # only past the API's check
            logger.warning("request %s: %s is not enabled; it reads everything", request.request_id, selector.name)
        elif selector and not request.resumable:
            self.reads.start(request.request_id, selector)
            self.kv_blocks.own_answers[request.request_id] = request.num_prompt_tokens

    def _plan_prefill(self, request: Request) -> None:
        """Whether the prompt is attended by a pattern; it then has a part of the prefix cache of its own."""
        params = request.sampling_params
        words = (params.extra_args or {}).get(PREFILL_FIELD) if params else None
        pattern = make_pattern(words, PREFILL_FIELD) if words else None
        if pattern is None or request.resumable:
            return
        # Where blocks don't divide the units of plans, the API refuses patterns; the engine must not die of one.
        fits = ROWS % self.kv_blocks.block_size == 0
        planned = fits and applies(pattern, self.num_layers, request.num_prompt_tokens)
        self.prefills[request.request_id] = _Prefill(pattern, planned)
        if planned:
            salt = json.dumps([request.cache_salt, pattern_words(pattern)])
            # The hashes were made with the request: before anything has looked at them, make them anew.
            request.cache_salt, request.block_hashes = salt, []
            request.update_block_hashes()

    def _too_large(self, request: Request, plan: RetentionPlan) -> str | None:
        """Why the pool can't hold both what a compaction reads and what it keeps: such a request would wait forever."""
        most = max(request.num_prompt_tokens, plan.prompt_len) + 1
        needed = -(-most // plan.page_size) + plan.kept_pages + self.beside.most_blocks(most)
        there = self.kv_cache_manager.block_pool.num_gpu_blocks - 1  # one is vLLM's null block
        if needed <= there:
            return None
        return f"its compaction would need {needed} blocks, the KV cache has {there}; a smaller budget needs fewer"

    def _get_local_prefix_cache_hit(self, request: Request) -> Any:
        """A hit must leave to be computed what observers watch: queries are cached nowhere. Where a pattern plans, it
        ends with a whole block of queries."""
        blocks, num_tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        limit = self._hit_limit(request)
        limit = num_tokens if limit is None else min(limit, num_tokens)
        if self._planned(request):
            limit -= limit % ROWS
        if num_tokens > limit:  # found again: layers that slide need other blocks for less
            manager = self.kv_cache_manager
            found, num_tokens, _ = manager.coordinator.find_longest_cache_hit(request.block_hashes, limit)
            blocks = manager.create_kv_cache_blocks(found)
        return blocks, num_tokens, boundary, diverged

    def _hit_limit(self, request: Request) -> int | None:
        """Tokens of a request that may come from the prefix cache, for its policy's or selector's sake; None: all."""
        compression = self.compressions[request.request_id]
        if compression.plan is None or compression.policy is None:
            return self.reads.first_query(request.request_id, request.num_prompt_tokens)
        return compression.policy.first_query(compression.plan.prompt_len)

    def _planned(self, request: Request) -> bool:
        prefill = self.prefills.get(request.request_id)
        return prefill is not None and prefill.planned

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """A prompt with a suffix, or one that replays its answer after preemption, stops where it is compacted; one
        with a pattern, where a block of queries ends, or it waits for room for one."""
        num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        plan = self.compressions[request.request_id].plan
        boundary = plan.next_boundary(num_computed_tokens) if plan else None
        num_new_tokens = min(num_new_tokens, boundary - num_computed_tokens) if boundary else num_new_tokens
        if not self._planned(request):
            return num_new_tokens
        most = self.scheduler_config.long_prefill_token_threshold or ROWS  # vLLM's limit of a chunk; 0: none
        # Only where there is room for a block of queries, sooner or later.
        can_wait = most >= ROWS and self.max_num_scheduled_tokens >= self.max_num_running_reqs + ROWS
        # Where a prompt is compacted in front of its suffix, a chunk ends too, whole block or not.
        stop = min(boundary or request.num_prompt_tokens, request.num_prompt_tokens)
        return aligned(num_computed_tokens, num_new_tokens, stop, can_wait)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        starting = {request.req_id for request in output.scheduled_new_reqs}
        starting |= output.scheduled_cached_reqs.resumed_req_ids
        orders = StepOrders()
        self.reads.begin_step()
        for request_id, num_scheduled in output.num_scheduled_tokens.items():
            compression = self.compressions[request_id]
            if request_id in starting:
                self.reads.forget(request_id)
                self._start_prefill(orders, request_id)
                self._watch(orders, request_id)
            if compression.plan is None:
                self._read(orders, request_id, num_scheduled)
                continue
            if request_id in starting:
                compression.boundary = 0
                orders.start.append(Start(request_id, policy_words(compression.policy), compression.plan))
            # `schedule` has already advanced the count of computed tokens by this step's.
            computed = self.requests[request_id].num_computed_tokens - num_scheduled
            boundary = compression.plan.last_boundary(computed)
            if boundary > compression.boundary:
                orders.compact.append(self._compact(request_id, compression, boundary))
                compression.boundary = boundary
                self.reads.forget(request_id)
            self._read(orders, request_id, num_scheduled)
        if self.audit_every and self.current_step % self.audit_every == 0:
            self._check(orders, output.num_scheduled_tokens)
        if orders:
            attach_orders(output, orders)
        return output

    def _check(self, orders: StepOrders, scheduled: Iterable[str]) -> None:
        """Look whether all blocks are accounted for, and let workers compare.

        Raises:
            AuditError: they aren't.
        """
        self.audit.check(self.requests)
        for request_id in scheduled:
            boundary = self.compressions[request_id].boundary
            orders.owned[request_id] = self.audit.check_scheduled(self.requests[request_id], boundary)

    def _start_prefill(self, orders: StepOrders, request_id: str) -> None:
        prefill = self.prefills.get(request_id)
        if prefill and prefill.planned:
            prompt_len = self.requests[request_id].num_prompt_tokens
            orders.patterns.append(StartPattern(request_id, pattern_words(prefill.pattern), prompt_len))

    def _watch(self, orders: StepOrders, request_id: str) -> None:
        """Let workers keep a prompt's last queries where its selector selects by them. A compacted cache has lost some
        of what they would be compared with."""
        if self.compressions[request_id].plan is None:
            watch = self.reads.watch(request_id, self.requests[request_id].num_prompt_tokens)
            orders.watch += [watch] if watch else []

    def _read(self, orders: StepOrders, request_id: str, num_scheduled: int) -> None:
        """Say what a request's step reads where it has a selector, and one token behind its prompt."""
        request, compression = self.requests[request_id], self.compressions[request_id]
        context = request.num_computed_tokens
        if context <= request.num_prompt_tokens:
            return
        if num_scheduled != 1 or request.is_prefill_chunk:
            self.reads.forget(request_id)  # an answer's replay, in chunks of any size: no reader sees these tokens
            return
        page_size, first_block, held = self.kv_blocks.block_size, 0, context
        if compression.plan and compression.boundary:
            first_block = compression.boundary // page_size
            held -= (first_block - compression.plan.kept_pages) * page_size
        read = self.reads.plan(request_id, context, held)
        if read is None:
            return
        orders.reads[request_id] = read
        if read.prepare:
            # One block more than is filled where this step's token begins one.
            blocks = self.kv_blocks.req_to_blocks[request_id][first_block : -(-context // page_size)]
            ids = [block.block_id for block in blocks]
            orders.prepare.append(Prepare(request_id, read.selector, read.place, ids, first_block, context - 1))

    def _compact(self, request_id: str, compression: _Compression, boundary: int) -> Compact:
        page_size, bins = self.kv_blocks.block_size, 0
        if compression.tells_positions:
            bins = bin_width(max(self.requests[request_id].num_prompt_tokens, boundary))
        blocks = self.kv_blocks.req_to_blocks[request_id]
        blocks = blocks[compression.boundary // page_size : -(-boundary // page_size)]
        targets = [] if compression.boundary else self.kv_blocks.target_blocks[request_id]
        ids = [block.block_id for block in blocks], [block.block_id for block in targets]
        return Compact(request_id, *ids, boundary, bins)

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        for report in reports_of(model_runner_output):
            if isinstance(report, PatternReport):
                self.prefill_totals.add(report)
                if prefill := self.prefills.get(report.request_id):
                    prefill.report = report
                continue
            compression = self.compressions.get(report.request_id)
            if compression and compression.plan and compression.policy:  # not aborted meanwhile
                compression.report = report
                self.compression_totals.add(compression.policy.name, report)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        # Stop strings are found by the API process: such a request is then aborted here and never sends a last
        # output, so any of its outputs may be the one that ends the answer.
        for part in outputs.values():
            for output in part.outputs:
                request = self.requests.get(output.request_id)
                if request and request.sampling_params and request.sampling_params.stop:
                    output.kv_transfer_params = self._told(request)
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's statistics of a step, and who holds the pool's blocks, in the one dictionary there that is free."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.kv_connector_stats = {POOL: self._pool()}
        return stats

    def _pool(self) -> dict[str, int]:
        page_size, compacted = self.kv_blocks.block_size, 0
        for request in self.running:
            compression = self.compressions[request.request_id]
            if compression.plan and compression.boundary:
                since = len(self.kv_blocks.req_to_blocks[request.request_id]) - compression.boundary // page_size
                compacted += compression.plan.kept_pages + since
        pool = self.kv_cache_manager.block_pool
        return pool_blocks(pool.num_gpu_blocks - 1, pool.get_num_free_blocks(), compacted)

    def _connector_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """The one road from here into a request's final output: vLLM's dictionary for KV connectors."""
        delay, params = super()._connector_finished(request)
        return delay, {**(params or {}), **self._told(request)}

    def _told(self, request: Request) -> dict[str, Any]:
        """What a client may know about a request and the server, by the name that `server.engine` looks for."""
        compression = self.compressions[request.request_id]
        usage = kv_cache_usage(
            policy_words(compression.policy),
            request.num_prompt_tokens,
            compression.plan,
            compression.report,
            self.block_bytes,
            self.kv_blocks.block_size,
        )
        if compression.reason:
            usage["not_compressed"] = compression.reason
        if self.beside.managers:
            held = self.beside.blocks(usage.get("compacted_tokens", request.num_prompt_tokens)) * self.block_bytes
            usage["other_layers"] = {"layers": self.beside.num_layers, "bytes_held": held}
        told: dict[str, Any] = {"usage": usage, "totals": self.compression_totals.by_policy}
        if self.audit_every:
            told["audits"] = self.audit.checks
        if selector := self.reads.selector(request.request_id):
            told["decode_usage"] = {**selector_words(selector), "steps": self.reads.usage(request.request_id)}
            told["decode_totals"] = {name: dict(steps) for name, steps in self.reads.totals.items()}
        if prefill := self.prefills.get(request.request_id):
            told["prefill_usage"] = prefill_usage(prefill.pattern, prefill.report)
            told["prefill_totals"] = self.prefill_totals.by_pattern
        return {EXTRA_ARG: told}

    def _free_blocks(self, request: Request) -> None:
        super()._free_blocks(request)
        self.compressions.pop(request.request_id, None)
        self.prefills.pop(request.request_id, None)
        self.reads.finish(request.request_id)
        self.kv_blocks.drop_plan(request.request_id)


class CompressionScheduler(_CompressionMixin, Scheduler):
    """For platforms without async scheduling."""


class AsyncCompressionScheduler(_CompressionMixin, AsyncScheduler):
    """For async scheduling."""
