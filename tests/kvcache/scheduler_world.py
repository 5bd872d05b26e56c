"""vLLM's scheduler and block managers, ours in them, and a worker without a model: our compressor and page tables over
a cache whose numbers say whose they are.

Every token that is "computed" writes its author and its position into all of its pages. Every step reads what attention
would read, through vLLM's block tables and our page tables, and compares: a block that was given away too early, a page
of somebody else's, a prefix that should not have been shared, all show as a wrong author.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from attention_plugins.decode.schedule import Prepare, Watch
from attention_plugins.vllm_adapter.runtime import CompressionRuntime
from kvcache.compressor import Compressor
from kvcache.pages import InterleavedCodec, PageGeometry
from kvcache.tables import PageTables
from kvcache.vllm_adapter.manager import CompressibleAttentionSpec
from kvcache.vllm_adapter.orders import attach_reports, orders_of
from kvcache.vllm_adapter.scheduler import AsyncCompressionScheduler, CompressionScheduler

LAYERS, HEADS, PAGE, SIZE, WINDOW = 2, 2, 16, 4, 40
STOP = 1
"""The token that ends an answer."""
PRIVATE = 1 << 20
"""Authors from here on are requests whose tokens saw less than their hashes would say."""
GROUP = 1 << 22
"""What is added to an author in the second group's pages."""

init_none_hash(sha256)


@dataclass
class Life:
    """A request, and what is known of it beside the scheduler.

    Attributes:
        authors: int64 [longest], by position who wrote the text up to there; other requests may have begun alike.
        salted: what is added to them, by pattern and client's salt.
        stop_at: place of the token that ends the answer.
    """

    name: str
    authors: np.ndarray
    prompt_len: int
    max_tokens: int
    stop_at: int
    words: dict[str, dict[str, Any]]
    salted: int = 0
    outputs: list[int] = field(default_factory=list)

    def token(self, position: int) -> int:
        if position - self.prompt_len == self.stop_at:
            return STOP
        return int(self.authors[position]) * 4096 + position + 2


@dataclass
class Row:
    """A request in the worker.

    Attributes:
        tables: by group, block ids by logical number; as in vLLM's workers, ids stay where blocks were released.
        written: int64 [longest], by position the author that its pages must name.
        epoch: author of what it alone may read.
    """

    life: Life
    tables: list[list[int]]
    computed: int
    known: int
    epoch: int
    written: np.ndarray


class Broken(AssertionError):
    """The worker read what it should not have."""


class _Selectors:
    """In place of a worker's selectors: reads everything, looks at orders, keeps no queries."""

    windows: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, world: Worker) -> None:
        self.world = world
        self.reads: dict[str, Any] = {}

    def prepare(self, order: Prepare) -> None:
        row = self.world.rows[order.request_id]
        own = row.tables[0][order.first_block : order.first_block + len(order.blocks)]
        if own != order.blocks[: len(own)] or order.tokens > (order.first_block + len(order.blocks)) * PAGE:
            raise Broken(f"{order} isn't what {order.request_id} holds: {row.tables[0]}")

    def watch(self, order: Watch) -> None:
        if not 0 <= order.first < order.end:
            raise Broken(f"{order} has no queries")

    def windows_of(self, request_id: str) -> tuple[()]:
        return ()

    def finish(self, request_id: str) -> None:
        pass

    def graph(self, scheduled: Mapping[str, int]) -> None:
        return None


class _Patterns:
    """In place of a worker's patterns: attends to everything."""

    current: Mapping[str, Any] = MappingProxyType({})

    def start(self, order: Any) -> None:
        pass

    def finish(self, name: str) -> None:
        pass

    def begin_step(self, *args: Any) -> None:
        pass

    def end_step(self) -> list[Any]:
        return []


class Worker:
    """Carries out steps. `keep`: how many blocks there are."""

    def __init__(self, blocks: int, groups: int, most: int, longest: int) -> None:
        self.groups = groups
        geometry = PageGeometry(tuple(HEADS * layer for layer in range(LAYERS)), LAYERS * HEADS, HEADS, PAGE, SIZE)
        pages = torch.zeros(blocks * LAYERS * HEADS, 2 * PAGE * SIZE)
        self.tokens = pages.numpy().reshape(blocks, LAYERS * HEADS, PAGE, 2 * SIZE)
        tables = PageTables(geometry, slots=most, width=-(-longest // PAGE) + 1)
        self.compressor = Compressor(
            geometry, InterleavedCodec(PAGE, SIZE), pages, tables, scale=1.0, keep_positions=True
        )
        self.batch: list[str] = []
        stand_ins: tuple[Any, Any] = _Selectors(self), _Patterns()
        self.runtime = CompressionRuntime(self.compressor, *stand_ins, lambda common: self.batch)
        self.rows: dict[str, Row] = {}
        self.lives: dict[str, Life] = {}
        self._epochs = count(PRIVATE)
        self._own = np.zeros((LAYERS * HEADS, 1), dtype=np.float32) + np.arange(LAYERS * HEADS)[:, None]

    def execute(self, output: SchedulerOutput) -> ModelRunnerOutput:
        """One step: orders, block tables, writing, reading, sampling."""
        self._update(output)
        self.runtime.begin_step(output)
        reads = orders.reads if (orders := orders_of(output)) else {}
        scheduled = output.num_scheduled_tokens
        self.batch = list(scheduled)
        for name, tokens in scheduled.items():
            self._write(self.rows[name], tokens, name in reads)
        self._look(scheduled)
        for name, tokens in scheduled.items():
            self._read(self.rows[name], self.rows[name].computed + tokens)
        sampled = [self._sample(self.rows[name], tokens) for name, tokens in scheduled.items()]
        self.runtime.end_step()
        reports = [report.finish() for report in self.runtime.take_reports()]
        result = ModelRunnerOutput(self.batch, {name: index for index, name in enumerate(self.batch)}, sampled)
        attach_reports(result, reports)
        return result

    def _update(self, output: SchedulerOutput) -> None:
        """Block tables, as vLLM's model runners keep them."""
        for name in output.finished_req_ids:
            self.rows.pop(name, None)
        for new in output.scheduled_new_reqs:
            known = len(new.prefill_token_ids or new.prompt_token_ids)
            self._begin(new.req_id, new.block_ids, new.num_computed_tokens, known)
        cached = output.scheduled_cached_reqs
        for index, name in enumerate(cached.req_ids):
            blocks, computed = cached.new_block_ids[index], cached.num_computed_tokens[index]
            known = self.lives[name].prompt_len + cached.num_output_tokens[index]
            if name in cached.resumed_req_ids:
                self._begin(name, blocks, computed, known)
                continue
            row = self.rows[name]
            if row.computed != computed:
                raise Broken(f"{name}: {computed} tokens are computed, the worker has {row.computed}")
            row.known = known
            for table, more in zip(row.tables, blocks or ([],) * self.groups, strict=True):
                table += more

    def _begin(self, name: str, blocks: tuple[list[int], ...], computed: int, known: int) -> None:
        life = self.lives[name]
        written = np.full(len(life.authors), -1)
        written[:computed] = life.authors[:computed] + life.salted
        self.rows[name] = Row(life, [[*table] for table in blocks], computed, known, next(self._epochs), written)

    def _write(self, row: Row, tokens: int, selects: bool) -> None:
        at = np.arange(row.computed, row.computed + tokens)
        alone = selects or self.compressor.slot(row.life.name) is not None
        row.written[at] = row.epoch if alone else row.life.authors[at] + row.life.salted
        for group, table in enumerate(row.tables):
            blocks = np.array(table)[at // PAGE]
            if not blocks.all():
                raise Broken(f"{row.life.name}: group {group} has no block for one of {at}: {table}")
            content = np.empty((len(at), LAYERS * HEADS, 3), dtype=np.float32)
            content[..., 0] = (row.written[at] + group * GROUP)[:, None]
            content[..., 1], content[..., 2] = at[:, None], self._own[:, 0]
            self.tokens[blocks, :, at % PAGE, :3] = content

    def _look(self, scheduled: Mapping[str, int]) -> None:
        """Show observers the step's queries, through the runtime, and let it check itself."""
        width = max(len(self.rows[name].tables[0]) for name in scheduled) if scheduled else 0
        table = np.zeros((len(scheduled), width), dtype=np.int32)
        for index, name in enumerate(scheduled):
            own = self.rows[name].tables[0]
            table[index, : len(own)] = own
        starts = np.concatenate([[0], np.cumsum(list(scheduled.values()))]).astype(np.int32)
        lengths = [self.rows[name].computed + tokens for name, tokens in scheduled.items()]
        common: Any = SimpleNamespace(
            block_table_tensor=torch.from_numpy(table), query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens_cpu_upper_bound=torch.tensor(lengths),
        )  # fmt: skip
        self.runtime.audit(common)
        captures = self.runtime.captures(common)
        if captures:
            queries = torch.ones(int(starts[-1]), HEADS, SIZE)
            for capture in captures:
                for layer in range(LAYERS):
                    capture.record(layer, queries)

    def _read(self, row: Row, length: int) -> None:
        """Look at all that the request's attention would look at."""
        name, slot = row.life.name, self.compressor.slot(row.life.name)
        first = 0
        if slot is not None:
            first = int(self.compressor.tables.first_block[slot]) * PAGE
            self._read_compacted(row, slot, first)
        self._expect(name, 0, row.tables[0], row.written, first, length)
        for group in range(1, self.groups):
            self._expect(name, group, row.tables[group], row.written, max(0, row.computed - WINDOW + 1), length)

    def _expect(self, name: str, group: int, table: list[int], written: np.ndarray, first: int, length: int) -> None:
        at = np.arange(first, length)
        found = self.tokens[np.array(table)[at // PAGE], :, at % PAGE]
        wanted = (written[first:length] + group * GROUP)[:, None]
        if not ((found[..., 0] == wanted) & (found[..., 1] == at[:, None]) & (found[..., 2] == self._own[:, 0])).all():
            wrong = np.flatnonzero((found[:, 0, 0] != wanted[:, 0]) | (found[:, 0, 1] != at))
            raise Broken(f"{name}, group {group}: at {at[wrong]} it reads {found[wrong, 0, :3]}, not {wanted[wrong]}")

    def _read_compacted(self, row: Row, slot: int, first: int) -> None:
        """Kept tokens: whole pages, no position twice, all of the request's own text, the forced ones among them."""
        request = self.compressor.requests[row.life.name]
        plan, counts = request.plan, self.compressor.page_counts(row.life.name)
        appended = torch.tensor(row.tables[0][first // PAGE :] or [0])
        pages = self.compressor.tables.answer_pages(slot, counts, appended).flatten(0, 1).numpy()
        content = self.tokens.reshape(-1, PAGE, 2 * SIZE)
        pinned = [*range(plan.pinned), *range(*plan.question)]
        for number, pages_of_row in enumerate(counts.flatten().tolist()):
            found = content[pages[number, :pages_of_row]].reshape(-1, 2 * SIZE)
            at = found[:, 1].astype(np.int64)
            own = row.written[at.clip(0, len(row.written) - 1)]
            if (found[:, 0] != own).any() or (found[:, 2] != number).any() or (at >= first).any():
                raise Broken(f"{row.life.name}: row {number} has kept {found[:, :3]}")
            if len(set(at.tolist())) != len(at) or not {p for p in pinned if p < first} <= set(at.tolist()):
                raise Broken(f"{row.life.name}: row {number} has kept the positions {sorted(at)}, pinned are {pinned}")

    def _sample(self, row: Row, tokens: int) -> list[int]:
        row.computed += tokens
        return [row.life.token(row.computed)] if row.computed >= row.known else []


def cache_config(blocks: int, hybrid: bool) -> KVCacheConfig:
    shape: dict[str, Any] = {"block_size": PAGE, "num_kv_heads": HEADS, "head_size": SIZE, "dtype": torch.float32}
    ours = [f"full.{layer}" for layer in range(LAYERS)]
    groups = [KVCacheGroupSpec(ours, CompressibleAttentionSpec(**shape))]
    if hybrid:
        theirs = [f"sliding.{layer}" for layer in range(LAYERS)]
        groups.append(KVCacheGroupSpec(theirs, SlidingWindowSpec(**shape, sliding_window=WINDOW)))
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)


class World:
    """A scheduler and a worker, step by step. With `ahead`, steps are scheduled before earlier ones have come back."""

    def __init__(self, config: Any, *, blocks: int, hybrid: bool = False, ahead: int = 0) -> None:
        """
        Args:
            config: vLLM's, of any small model.
            blocks: of the pool, the null block among them.
        """
        config.cache_config.num_gpu_blocks = blocks
        kind = AsyncCompressionScheduler if ahead else CompressionScheduler
        structured: Any = SimpleNamespace(
            accept_tokens=lambda request, tokens: True, should_advance=lambda request: False
        )
        self.scheduler = kind(config, cache_config(blocks, hybrid), structured, PAGE)
        self.scheduler.use_v2_model_runner = bool(ahead)
        self.cache = self.scheduler.kv_cache_manager
        self.pool = self.cache.block_pool
        self.ahead, self.longest = ahead, self.scheduler.max_model_len
        self.worker = Worker(blocks, 1 + hybrid, self.scheduler.max_num_running_reqs, self.longest)
        self.hasher = get_request_block_hasher(PAGE, sha256)
        self.scheduled: deque[SchedulerOutput] = deque()
        self.executed: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.ended: list[Life] = []
        self.taken = self.scheduler.audit.others
        self.steps, self.broken = 0, False
        self.seen: Counter[str] = Counter()
        self._names = count()
        self._hashes: dict[int, Any] = {}
        self._popped: set[int] = set()
        self._watch_pool()

    def _watch_pool(self) -> None:
        original = self.pool.get_new_blocks

        def get_new_blocks(number: int) -> list[Any]:
            found = original(number)
            self._popped |= {block.block_id for block in found}
            return found

        self.pool.get_new_blocks = get_new_blocks

    @property
    def may_schedule(self) -> bool:
        """Whether vLLM would begin another step now."""
        return len(self.scheduled) + len(self.executed) <= self.ahead

    @property
    def lives(self) -> list[Life]:
        return [self.worker.lives[name] for name in self.scheduler.requests]

    def admit(
        self, parent: Life | int, shared: int, own: int, max_tokens: int, stop_at: int, words: dict[str, Any],
        *, priority: int = 0, salt: str | None = None, skip_cache: bool = False,
    ) -> Life:  # fmt: skip
        """A request whose prompt begins as another's text, or as that of a family, and goes on alone."""
        number = next(self._names)
        author = 16 + number
        before = parent.authors if isinstance(parent, Life) else np.full(self.longest + 1, parent)
        authors = np.full(self.longest + 1, author)
        authors[:shared] = before[:shared]
        life = Life(f"r{number}", authors, shared + own, max_tokens, stop_at, words)
        text = [life.token(position) for position in range(life.prompt_len)]
        if isinstance(parent, Life):
            text[:shared] = [parent.token(position) for position in range(shared)]
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0, extra_args=words or None, stop_token_ids=[STOP],
            prompt_logprobs=1 if skip_cache else None,
        )  # fmt: skip
        request = Request(
            life.name, text, params, None, arrival_time=float(number), cache_salt=salt, priority=priority,
            block_hasher=self.hasher,
        )  # fmt: skip
        self.worker.lives[life.name] = life
        with self._operation():
            self.scheduler.add_request(request)
        life.salted = _salt(request.cache_salt)
        return life

    def schedule(self) -> None:
        """Decide a step."""
        with self._operation():
            output = self.scheduler.schedule()
            self.scheduled.append(output)
        self.seen["preemptions"] += len(output.preempted_req_ids or ())
        self.seen["hits"] += sum(new.num_computed_tokens > 0 for new in output.scheduled_new_reqs)
        for order in orders.compact if (orders := orders_of(output)) else ():
            self.seen["compactions" if order.target_blocks else "later compactions"] += 1

    def execute(self) -> None:
        """Run the oldest step that was decided."""
        output = self.scheduled.popleft()
        with self._operation():
            self.executed.append((output, self.worker.execute(output)))

    def process(self) -> None:
        """Take in what the oldest executed step has brought."""
        output, result = self.executed.popleft()
        with self._operation():
            for told in self.scheduler.update_from_output(output, result).values():
                for part in told.outputs:
                    self.worker.lives[part.request_id].outputs += part.new_token_ids
                    if part.finish_reason is not None:
                        self.ended.append(self.worker.lives[part.request_id])
                        self._check_answer(self.ended[-1], part.kv_transfer_params["kv_cache"]["usage"])

    def step(self) -> None:
        """Move on by one step, whichever stage it takes."""
        if self.may_schedule:
            self.schedule()
        elif self.scheduled and not self.executed:
            self.execute()
        else:
            self.process()

    def abort(self, life: Life) -> None:
        self.seen["aborts"] += 1
        with self._operation():
            self.scheduler.finish_requests(life.name, RequestStatus.FINISHED_ABORTED)

    def preempt_all(self) -> None:
        with self._operation(reset=True):
            self.scheduler.reset_prefix_cache(reset_running_requests=True)

    def evict(self, number: int) -> None:
        """Throw the oldest free blocks out of the prefix cache."""
        self.seen["evicted"] += len(self._hashes)
        with self._operation():
            self.pool.free_blocks(self.pool.get_new_blocks(min(number, self.pool.get_num_free_blocks())))

    def squeeze(self, number: int) -> None:
        """Let somebody else hold free blocks, so that requests are preempted."""
        with self._operation():
            self.taken += self.pool.get_new_blocks(min(number, self.pool.get_num_free_blocks()))

    def release(self) -> None:
        with self._operation():
            self.pool.free_blocks(self.taken)
            self.taken.clear()

    @contextmanager
    def _operation(self, reset: bool = False) -> Iterator[None]:
        """Something happens; after it, look at everything. `reset`: hashes may be forgotten."""
        self.steps, self.broken = self.steps + 1, True
        yield
        self._check(reset)
        self.broken = False

    def _check(self, reset: bool) -> None:
        scheduler = self.scheduler
        scheduler.audit.check(scheduler.requests)
        for known in (scheduler.compressions, scheduler.prefills, scheduler.reads._requests):
            if gone := known.keys() - scheduler.requests.keys():
                raise Broken(f"{gone} have ended and are remembered")
        places = [one.place for one in scheduler.reads._requests.values() if one.place is not None]
        if sorted([*places, *scheduler.reads._free]) != list(range(scheduler.reads.rows)):
            raise Broken(f"selectors' places {places} and the free ones aren't each there once")
        hashes = {block.block_id: block.block_hash for block in self.pool.blocks if block.block_hash is not None}
        if not reset:
            lost = {block for block, known in self._hashes.items() if hashes.get(block) != known} - self._popped
            if lost:
                raise Broken(f"blocks {lost} have lost their hashes, and nobody took them")
        self._hashes, self._popped = hashes, set()

    def _check_answer(self, life: Life, usage: dict[str, Any]) -> None:
        wanted = [life.token(life.prompt_len + place) for place in range(min(life.max_tokens, life.stop_at + 1))]
        if life.outputs != wanted:
            raise Broken(f"{life.name} answered {life.outputs}, not {wanted}")
        words = life.words.get("kv_cache", {})
        budget = words.get("budget")
        if isinstance(budget, int) and not words.get("interval") and "not_compressed" not in usage:
            seen = life.prompt_len - words.get("suffix", 0)
            kept = (budget - seen % PAGE) // PAGE * PAGE + seen % PAGE + words.get("suffix", 0)
            if usage["bytes_freed"] and usage["kept_tokens"]["mean"] != kept:
                raise Broken(f"{life.name}: {usage} of {words}, {kept} should stay")

    def finish(self) -> None:
        """Let all requests end, and look that nothing is left."""
        if self.taken:
            self.release()
        scheduler = self.scheduler
        for _ in range(40 * self.longest):
            if not scheduler.requests:
                break
            self.step()
        else:
            raise Broken(f"{list(scheduler.requests)} never end; {self.pool.get_num_free_blocks()} blocks are free")
        for _ in range(3):  # workers hear of the end
            self.schedule()
            while self.scheduled:
                self.execute()
            while self.executed:
                self.process()
        if (
            self.worker.compressor.requests
            or len(self.worker.compressor.tables._free) != scheduler.max_num_running_reqs
        ):
            raise Broken(f"the worker remembers {list(self.worker.compressor.requests)}")
        if scheduler.audit.used or any(
            manager.req_to_blocks for manager in self.cache.coordinator.single_type_managers
        ):
            raise Broken(f"{scheduler.audit.used} blocks are in use when all have ended")
        if not scheduler.reset_prefix_cache() or len(self.pool.cached_block_hash_to_block):
            raise Broken("the prefix cache can't be emptied")


_salts: dict[str | None, int] = {None: 0}


def _salt(salt: str | None) -> int:
    """A number for each."""
    return _salts.setdefault(salt, len(_salts) << 14)
