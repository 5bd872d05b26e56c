"""A paged KV cache with one known prompt in it, and compression run on it as a worker runs it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from attention_plugins.page_rows import page_rows
from kvcache.compressor import Compressor
from kvcache.model import ModelFacts
from kvcache.namm import SHAPES, Network
from kvcache.orders import Compact, CompactionReport, Start
from kvcache.pages import InterleavedCodec, PageCodec, PageGeometry, PermutedCodec
from kvcache.plan import RetentionPlan
from kvcache.policies.base import Policy
from kvcache.registry import make_policy, policies, policy_class
from kvcache.rotary import Rotary
from kvcache.tables import PageTables
from tests.device import DEVICE

PAGE = 16
HEAD_DIM = 8
SCALE = HEAD_DIM**-0.5
WINDOW = 6
SINKS = 3
ROTARY_DIM, ROTARY_BASE = 6, 50.0
BUDGETED = sorted(set(policies()) - {"duoattention", "raas"})
"""Policies that keep of a prompt what a budget says; DuoAttention's gates say it instead, RaaS compacts answers."""


def words(policy: str, budget: int | str, **arguments: Any) -> dict[str, Any]:
    """A request's words with small forced parts, in whatever arguments this policy (with these parts) has."""
    small = {"sinks": SINKS, "recent": WINDOW, "window": WINDOW, "interval": 0}
    known = policy_class({"policy": policy, **arguments}).Args.model_fields
    return {"policy": policy, "budget": budget, **{k: v for k, v in small.items() if k in known}, **arguments}


def rotary_table(positions: int, rotary_dim: int, base: float) -> torch.Tensor:
    """Cosines and sines of `position / base ** (2 * pair / rotary_dim)`: float32 [positions, rotary_dim]."""
    pairs = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    angles = torch.arange(positions, dtype=torch.float64)[:, None] / base**pairs
    return torch.cat((angles.cos(), angles.sin()), -1).float()


ROTARY = Rotary(rotary_table(1024, ROTARY_DIM, ROTARY_BASE).to(DEVICE), neox=True)
"""What the synthetic model's queries were rotated with: two numbers of a head are not."""


def random_network(seed: int = 0, device: torch.device | str = "cpu") -> Network:
    """NAMM's, with weights that make scores differ."""
    generator = torch.Generator().manual_seed(seed)
    return Network({name: torch.randn(shape, generator=generator).to(device) for name, shape in SHAPES.items()})


MODEL = ModelFacts(ROTARY, random_network(device=DEVICE))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """For bitwise comparison: NaNs are equal to themselves."""
    return tensor.view(torch.int32)


class PagedCache:
    """Random keys, values and queries of `prompt_len + new` tokens; the prompt's lie in pages.

    Block ids are shuffled, a page's elements are permuted (on a GPU, whose kernels read them, token by token), layers
    share one allocation, and every slot that was never written holds NaN, so that reading one shows.

    Attributes (all tensors on `device`):
        keys, values: [num_layers, num_kv_heads, prompt_len + new, HEAD_DIM].
        queries: [num_layers, prompt_len + new, num_heads, HEAD_DIM].
        blocks: ids of the blocks of all tokens; `free`: ids of blocks that no token uses.
    """

    def __init__(
        self,
        prompt_len: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int = 2,
        num_layers: int = 4,
        page_size: int = PAGE,
        new: int = 0,
        block_major: bool = False,
        uneven: bool = False,
        seed: int = 0,
        device: torch.device | str = DEVICE,
    ) -> None:
        """`uneven`: attention is sharp in some layers and heads and flat in others, as in a model."""
        self.prompt_len, self.num_heads, self.page_size = prompt_len, num_heads, page_size
        self.device = torch.device(device)
        generator = torch.Generator().manual_seed(seed)
        used, total = -(-(prompt_len + new) // page_size), 2 * -(-(prompt_len + new) // page_size) + 3
        shuffled = torch.randperm(total, generator=generator)
        self.blocks, self.free = shuffled[:used], shuffled[used:]
        if block_major:
            base, stride = [layer * num_kv_heads for layer in range(num_layers)], num_layers * num_kv_heads
        else:
            base, stride = [layer * total * num_kv_heads for layer in range(num_layers)], num_kv_heads
        self.geometry = PageGeometry(tuple(base), stride, num_kv_heads, page_size, HEAD_DIM)
        elements = 2 * page_size * HEAD_DIM
        permuted = PermutedCodec(torch.randperm(elements, generator=generator), page_size, HEAD_DIM)
        on_cpu = self.device.type == "cpu"
        self.codec: PageCodec = permuted if on_cpu else InterleavedCodec(page_size, HEAD_DIM)
        shape = (num_layers, num_kv_heads, prompt_len + new, HEAD_DIM)
        self.keys = torch.randn(shape, generator=generator)
        self.values = torch.randn(shape, generator=generator)
        if uneven:
            self.keys += torch.linspace(0, 1, num_kv_heads)[:, None, None]
        self.queries = 2 * torch.randn(num_layers, prompt_len + new, num_heads, HEAD_DIM, generator=generator)
        if uneven:
            layers, heads = torch.linspace(0.4, 1.6, num_layers), torch.linspace(1.5, 0.5, num_heads)
            self.queries *= layers[:, None, None, None] * heads[:, None]
        self.pages = torch.full((num_layers * total * num_kv_heads, elements), float("nan"))
        self.write(0, prompt_len, self.pages)
        for name in ("blocks", "free", "keys", "values", "queries", "pages"):
            setattr(self, name, getattr(self, name).to(self.device))

    def write(self, first: int, last: int, pages: torch.Tensor) -> None:
        """Write the tokens `first ... last - 1` where they belong, as a model's forward pass does."""
        for token in range(first, last):
            block, slot = self.blocks[token // self.page_size][None], token % self.page_size
            for layer in range(self.geometry.num_layers):
                at = self.geometry.pages_of(layer, block)[:, 0]
                keys, values = self.codec.unpack(pages[at])
                keys[:, slot] = self.keys[layer, :, token]
                values[:, slot] = self.values[layer, :, token]
                pages[at] = self.codec.pack(keys, values)

    def compressor(self, slots: int = 1) -> Compressor:
        """With one table unless more are asked for: a slot that isn't given back is missed at once."""
        tables = PageTables(self.geometry, slots=slots, width=len(self.free), device=self.device)
        return Compressor(self.geometry, self.codec, self.pages, tables, scale=SCALE, model=MODEL, keep_positions=True)

    def block_table(self, first_block: int, length: int) -> torch.Tensor:
        """vLLM's row for `length` tokens: int32 [1, blocks]. Entries that nobody may read hold no block's id."""
        table = torch.full((1, len(self.blocks) + 2), 10**6, dtype=torch.int32, device=self.device)
        last = -(-length // self.page_size)
        table[0, first_block:last] = self.blocks[first_block:last]
        return table

    def plan(self, order: dict[str, Any]) -> RetentionPlan | None:
        policy = make_policy(order)
        assert policy is not None
        return policy.plan(self.prompt_len, self.page_size)

    def start(self, compressor: Compressor, order: dict[str, Any], request_id: str = "r") -> RetentionPlan:
        plan = self.plan(order)
        assert plan is not None
        compressor.start(Start(request_id, order, plan))
        return plan

    def feed(self, compressor: Compressor, chunks: list[int], request_id: str = "r", first: int = 0) -> None:
        """Let the prompt pass in chunks of these sizes, from token `first` on."""
        for size in chunks:
            seen = self.blocks[: -(-(first + size) // self.page_size)]
            for observer in compressor.observers(request_id):
                begin, end = observer.overlap(first, first + size)
                if begin < end:
                    for layer in range(self.geometry.num_layers):
                        so_far = partial(compressor.evidence, layer, self.geometry.pages_of(layer, seen), first + size)
                        observer.record(layer, begin, self.queries[layer, begin:end], so_far)
            first += size

    def compact(self, compressor: Compressor, plan: RetentionPlan, request_id: str = "r") -> CompactionReport:
        source = self.blocks[: -(-self.prompt_len // self.page_size)].tolist()
        return compressor.compact(
            Compact(request_id, source, self.free[: plan.kept_pages].tolist(), plan.prompt_len)
        ).finish()


@dataclass(frozen=True)
class Run:
    """One compression: the cache, what was ordered, and what came of it. `before`: all pages before it."""

    cache: PagedCache
    policy: Policy
    plan: RetentionPlan
    before: torch.Tensor
    report: CompactionReport
    tables: PageTables
    slot: int
    kept: list[list[torch.Tensor]]

    def heads(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(layer, KV head, kept positions)."""
        for layer, heads in enumerate(self.kept):
            for head, positions in enumerate(heads):
                yield layer, head, positions

    def recent(self, below_tail: int) -> int:
        """Last tokens of the prompt that always stay in a head that keeps so many below the tail."""
        return int(self.policy.recent_of(torch.tensor(below_tail + self.plan.tail)))

    def rows(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention is given at this logical length: pages [L, H, width] and slots in use [L, H], both int32."""
        return page_rows(
            self.tables,
            torch.tensor([self.slot], dtype=torch.int32, device=self.cache.device),
            torch.tensor([length], dtype=torch.int32, device=self.cache.device),
            self.cache.block_table(self.plan.full_pages, length),
        )

    def compacted(self, layer: int, head: int) -> torch.Tensor:
        """Compacted pages of one layer and head, in order: int64. These are all there are while the tail is empty."""
        pages, lengths = self.rows(self.plan.full_pages * self.plan.page_size)
        assert lengths[layer, head] % self.plan.page_size == 0
        return pages[layer, head, : int(lengths[layer, head]) // self.plan.page_size].long()


def compress(cache: PagedCache, order: dict[str, Any], chunks: list[int] | None = None) -> Run:
    """The whole life of a prompt, in these chunks or at once."""
    compressor, before = cache.compressor(), cache.pages.clone()
    plan = cache.start(compressor, order)
    cache.feed(compressor, chunks or [cache.prompt_len])
    report = cache.compact(compressor, plan)
    slot = compressor.slot("r")
    assert slot is not None
    policy = make_policy(order)
    assert policy is not None
    return Run(cache, policy, plan, before, report, compressor.tables, slot, compressor.kept_positions("r"))


def positions_of(kept: list[list[torch.Tensor]]) -> list[list[list[int]]]:
    return [[positions.tolist() for positions in heads] for heads in kept]
