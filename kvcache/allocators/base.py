"""What an allocator is."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict

from kvcache.allocation import uniform_shares
from kvcache.evidence import Evidence, LayerEvidence


class Arguments(BaseModel):
    """Arguments of a policy or of a part of one. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Allocator:
    """A part of a policy that shares its budget. Its `Args` become arguments of the policy."""

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    evidence: ClassVar[Evidence] = Evidence.NONE
    """What it needs beside scores."""

    class Args(Arguments):
        """No arguments."""

    def __init__(self, args: Any) -> None:
        """`args`: the policy's arguments, which include these."""
        self.args = args

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Name, title, paper, needs and argument schema, as JSON-able data."""
        return {
            "name": cls.name,
            "title": cls.title,
            "paper": cls.paper,
            "evidence": cls.evidence.value,
            "description": inspect.cleandoc(cls.__doc__ or ""),
            "arguments": cls.Args.model_json_schema(),
        }


class LayerAllocator(Allocator):
    """Shares a request's budget over its layers."""

    lengths_differ: ClassVar[bool] = True
    needs_statistics: ClassVar[bool] = False
    """Whether shares depend on the prompt: then each layer gives a number, and all layers wait for the last one."""

    def statistic(self, evidence: LayerEvidence) -> torch.Tensor:
        """One layer's number: float, no dimension, on the evidence's device. Asked for with `needs_statistics`."""
        raise NotImplementedError

    def shares(
        self, num_layers: int, budget: int, prompt_len: int, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens per KV head by layer.

        Args:
            budget: mean over layers, tokens.
            statistics: float64 [num_layers], on the CPU, with `needs_statistics`.

        Returns:
            float64 [num_layers] with sum exactly `num_layers * budget`; what is out of a layer's bounds is spread
            over the others later (`kvcache.allocation.apportion`).
        """
        raise NotImplementedError


class HeadAllocator(Allocator):
    """Shares a layer's tokens over its KV heads."""

    needs_scores: ClassVar[bool] = True

    def shares(self, scores: torch.Tensor, tokens: int) -> torch.Tensor:
        """Wished-for tokens of each KV head.

        Args:
            scores: float32 [num_kv_heads, n], forced tokens at infinity.
            tokens: mean over heads.

        Returns:
            [num_kv_heads] on the scores' device, with sum `num_kv_heads * tokens`; nothing may wait for the device.
        """
        raise NotImplementedError


class UniformLayers(LayerAllocator):
    """The same for every layer."""

    name = "uniform"
    title = "every layer the same"
    paper = "none"
    lengths_differ = False

    def shares(
        self, num_layers: int, budget: int, prompt_len: int, statistics: torch.Tensor | None = None
    ) -> torch.Tensor:
        return uniform_shares(num_layers, budget)


class EqualHeads(HeadAllocator):
    """The same for every KV head of a layer."""

    name = "equal"
    title = "every head of a layer the same"
    paper = "none"
    needs_scores = False
