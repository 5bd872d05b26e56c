"""Small prompts, whole, in chunks and in pages, and words for every pattern."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attention_plugins.prefill.base import Chunk, Pattern, Plan
from attention_plugins.prefill.registry import make_pattern
from tests.device import DEVICE

NUM_HEADS, NUM_KV_HEADS, DIM, UNIT = 4, 2, 16, 16
ODD = 1035
"""A multiple of neither 128 nor 16, nor of any tile."""

SPARSE: dict[str, dict[str, Any]] = {
    "xattention": {"threshold": 0.6},
    "flexprefill": {"gamma": 0.5, "min_budget": 128},
    "minference": {"vertical": 40, "slash": 60},
    "anchor": {"theta": 4.9, "step": 2},
    "hip": {"window": 256, "first_tokens": 256, "second_tokens": 128, "tokens": 128},
    "zipvl": {"tau": 0.05, "window": 40},
    "streaming": {"sinks": 20, "window": 100},
    "delta": {"base": {"pattern": "streaming", "sinks": 20, "window": 100}},
    "power": {"window": 1},
    "strided": {"local": 1, "stride": 4},
    "bigbird": {"window": 1, "random": 1},
}
"""Leaves something out of a prompt of `ODD` tokens."""

FULL: dict[str, list[dict[str, Any]]] = {
    "xattention": [{"threshold": 1.0}],
    "flexprefill": [{"gamma": 1.0}, {"gamma": 0.1, "min_budget": ODD}],
    "minference": [{"vertical": ODD, "slash": 50}, {"vertical": 30, "slash": ODD}],
    "anchor": [{"theta": float("inf")}, {"theta": 1e9}],
    "hip": [{"window": ODD}, {"first_tokens": 2048, "second_tokens": 2048, "tokens": 2048},
            {"share_heads": False, "first_tokens": 2048, "second_tokens": 2048, "tokens": 2048}],
    "zipvl": [{"tau": 1.0}],
    "streaming": [{"sinks": ODD}, {"window": ODD}],
    "delta": [{"base": {"pattern": "streaming", "window": ODD}}, {"gamma": 1}],
    "power": [{"window": 5}],
    "strided": [{"stride": 1}, {"local": 17}, {"dense_heads": 2}],
    "bigbird": [{"window": 17}, {"globals": 17}],
}  # fmt: skip
"""Settings that leave nothing out of it."""

LOOK = ("xattention", "flexprefill", "minference", "anchor", "zipvl", "hip")
"""Patterns that look at queries and keys."""


@dataclass(frozen=True)
class Prompt:
    """A prompt's queries [n, heads, d], keys and values [kv_heads, n, d] of one layer."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    def __len__(self) -> int:
        return len(self.queries)

    def chunk(self, first: int = 0, last: int | None = None, **more: Any) -> Chunk:
        last = len(self) if last is None else last
        more = {"scale": DIM**-0.5, "unit": UNIT, "prompt_len": len(self)} | more
        return Chunk(self.queries[first:last], self.keys[:, :last], **more)

    def chunks(self, cuts: Sequence[int]) -> Iterator[tuple[Chunk, torch.Tensor]]:
        """Chunks that begin at these positions, and the values they see."""
        for first, last in zip(cuts, [*cuts[1:], len(self)], strict=True):
            yield self.chunk(first, last), self.values[:, :last]


def make_prompt(length: int = ODD, seed: int = 0, strength: float = 2.0, num_heads: int = NUM_HEADS) -> Prompt:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(DEVICE)

    return Prompt(
        draw(length, num_heads, DIM) * strength, draw(NUM_KV_HEADS, length, DIM), draw(NUM_KV_HEADS, length, DIM)
    )


def attention(prompt: Prompt, first: int, last: int, head: int) -> torch.Tensor:
    """Probabilities of a range of queries, one row at a time: [last - first, last]."""
    found = torch.zeros(last - first, last)
    for row in range(first, last):
        logits = prompt.keys[head * NUM_KV_HEADS // NUM_HEADS, : row + 1] @ prompt.queries[row, head] * DIM**-0.5
        found[row - first, : row + 1] = logits.softmax(0)
    return found


def make(name: str, **more: Any) -> Pattern:
    """The pattern in its sparse settings, or these."""
    pattern = make_pattern({"pattern": name, **(more or SPARSE[name])})
    assert pattern is not None
    return pattern


def by_query_head(plan: Plan, num_heads: int = NUM_HEADS) -> torch.Tensor:
    return plan.mask.repeat_interleave(num_heads // len(plan.mask), 0)


@dataclass(frozen=True)
class Pages:
    """Keys [num_kv_heads, k_len, d] as a reader that hands out copies."""

    whole: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.whole.shape)

    def read(self, first: int, last: int) -> torch.Tensor:
        assert 0 <= first < last <= self.shape[1]
        return self.whole[:, first:last].clone()

    def gather(self, positions: torch.Tensor) -> torch.Tensor:
        return torch.stack([keys[at] for keys, at in zip(self.whole, positions, strict=True)])
