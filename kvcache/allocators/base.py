"""What an allocator is."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch

from kvcache.allocation import uniform_shares
from kvcache.evidence import LayerEvidence
from kvcache.method import Method
from kvcache.plan import RetentionPlan


class Allocator(Method):
    """A part of a policy that shares its budget. Its `Args` become arguments of the policy."""

    def __init__(self, args: Any) -> None:
        """`args`: the policy's arguments, which include these."""
        self.args = args


class LayerAllocator(Allocator):
    """Shares a request's budget over its layers."""

    lengths_differ: ClassVar[bool] = True

    def statistic(self, evidence: LayerEvidence) -> torch.Tensor | None:
        """What one layer says of the prompt, where shares depend on it; all layers then wait for the last one.

        Returns:
            float, no dimension, on the evidence's device; or None, from every layer.
        """
        return None

    @abstractmethod
    def shares(
        self, num_layers: int, budget: int, prompt_len: int, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens per KV head by layer.

        Args:
            budget: mean over layers, tokens.
            statistics: float64 [num_layers], on the CPU: what `statistic` gave, if it gave anything.

        Returns:
            float64 [num_layers] with sum exactly `num_layers * budget`; what is out of a layer's bounds is spread
            over the others later (`kvcache.allocation.apportion`).
        """


class HeadAllocator(Allocator):
    """Shares a layer's tokens over its KV heads."""

    needs_scores: ClassVar[bool] = True
    """Without, every head gets the same and `shares` isn't asked: the GPU would be waited for."""

    decides_layers: ClassVar[bool] = False
    """Whether `pages` shares over layers too; no layer allocator is asked then."""

    def pages(self, plan: RetentionPlan, low: int) -> torch.Tensor | None:
        """Pages of each layer and KV head where arguments and lengths alone decide them; else None, and `shares` is
        asked.

        Args:
            low: least pages of each.

        Returns:
            int64 [num_layers, num_kv_heads], on the CPU, with sum `num_layers * num_kv_heads * plan.kept_pages`.
        """
        return None

    @abstractmethod
    def shares(self, scores: torch.Tensor, tokens: int) -> torch.Tensor:
        """Wished-for tokens of each KV head.

        Args:
            scores: float32 [num_kv_heads, n], forced tokens at infinity.
            tokens: mean over heads.

        Returns:
            [num_kv_heads] on the scores' device, with sum `num_kv_heads * tokens`; nothing may wait for the device.
        """


class UniformLayers(LayerAllocator):
    """The same for every layer.

    Formula:
        tokens(l) = budget
    """

    name = "uniform"
    title = "every layer the same"
    paper = "none"
    lengths_differ = False

    def shares(
        self, num_layers: int, budget: int, prompt_len: int, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        return uniform_shares(num_layers, budget)


class EqualHeads(HeadAllocator):
    """The same for every KV head of a layer.

    Formula:
        tokens(head) = tokens(l)
    """

    name = "equal"
    title = "every head of a layer the same"
    paper = "none"
    needs_scores = False

    def shares(self, scores: torch.Tensor, tokens: int) -> torch.Tensor:
        return scores.new_full((len(scores),), float(tokens))
