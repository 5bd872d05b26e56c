"""Our side: what a policy keeps of a dumped prompt, token by token (a page is one token here)."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kvcache.allocation import apportion
from kvcache.evidence import LayerEvidence
from kvcache.model import ModelFacts
from kvcache.policies.base import Policy
from kvcache.registry import make_policy
from kvcache.rotary import Rotary
from kvcache.selection import force, keep_top


@dataclass(frozen=True)
class Prompt:
    """One dump: float32 keys and values [L, H_kv, n, d], queries [L, n, H, d], all post-RoPE; the model's rotation."""

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    rotary: torch.Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """num_layers, num_kv_heads, tokens."""
        num_layers, num_kv_heads, tokens, _ = self.keys.shape
        return num_layers, num_kv_heads, tokens


class Ours:
    """A policy's scores of every layer of one prompt, its budgets, and its choice."""

    def __init__(self, words: dict[str, Any], prompt: Prompt, budget: int) -> None:
        """`budget`: tokens kept per layer and KV head on average."""
        policy = make_policy(words if "gates" in words else {**words, "budget": budget})
        assert policy is not None
        self.policy: Policy = policy
        self.budget, self.prompt = budget, prompt
        layers = self._evidence()
        forced = policy.args.sinks, policy.recent
        self.scores = torch.stack([force(policy.scores(evidence), *forced) for evidence in layers])
        statistics = [policy.layer_allocator.statistic(evidence) for evidence in layers]
        self.statistics = None if None in statistics else torch.stack(statistics).double()  # type: ignore[arg-type]

    def _evidence(self) -> list[LayerEvidence]:
        """What the policy's observers and the cache tell, by layer."""
        (num_layers, _, tokens), prompt = self.prompt.shape, self.prompt
        scale = prompt.keys.shape[-1] ** -0.5
        model = ModelFacts(rotary=Rotary(prompt.rotary, neox=True))
        observers = self.policy.observers(num_layers, tokens, model)
        found = []
        for layer in range(num_layers):
            plain = LayerEvidence(layer, prompt.keys[layer], prompt.values[layer], None, scale, model=model)
            for observer in observers:
                seen = prompt.queries[layer, observer.first : observer.end]
                observer.record(layer, observer.first, seen, partial(copy, plain))
            observed = {observer.name: observer.found(layer) for observer in observers}
            whole = copy(plain)
            whole.window_queries, whole.observed = observed.get("window_queries"), observed
            found.append(whole)
        return found

    def counts(self) -> torch.Tensor:
        """Tokens of each layer and KV head: int64 [L, H_kv]."""
        policy, (num_layers, num_kv_heads, tokens) = self.policy, self.prompt.shape
        bounds = {"low": max(1, policy.args.sinks + policy.recent), "high": tokens}
        plan = policy.plan(tokens, 1) if policy.head_allocator.decides_layers else None
        if plan and (fixed := policy.head_allocator.pages(plan, bounds["low"])) is not None:
            return fixed
        shares = policy.layer_allocator.shares(num_layers, self.budget, tokens, self.statistics)
        layers = apportion(shares, self.budget * num_layers, **bounds)
        if not policy.head_allocator.needs_scores:
            return layers[:, None].expand(-1, num_kv_heads).contiguous()
        return torch.stack(
            [
                apportion(policy.head_allocator.shares(scores, int(n)).double(), int(n) * num_kv_heads, **bounds)
                for scores, n in zip(self.scores, layers, strict=True)
            ]
        )

    def kept(self, counts: torch.Tensor) -> torch.Tensor:
        """The choice at these counts [L, H_kv]: bool [L, H_kv, n]."""
        (_, _, tokens), flat = self.prompt.shape, self.scores.flatten(0, 1)
        positions = keep_top(flat, counts.flatten())
        mask = torch.zeros(len(flat), tokens + 1, dtype=torch.bool)  # a place more for what fills rows up
        return mask.scatter_(1, positions, True)[:, :tokens].view_as(self.scores)
