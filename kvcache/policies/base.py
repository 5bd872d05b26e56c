"""The policy interface."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field

from kvcache.allocation import uniform_shares
from kvcache.budget import Budget
from kvcache.evidence import Evidence, LayerEvidence
from kvcache.plan import RetentionPlan, minimum_budget, plan_retention


class PolicyArgs(BaseModel):
    """Arguments that every compressing policy takes. Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    budget: Budget = Field(1024, validate_default=True)
    sinks: int = Field(4, ge=0, le=1024, description="First tokens of the prompt that always stay (attention sinks).")


class Policy(ABC):
    """Decides what stays after the prompt.

    A policy declares what it needs (`evidence`), shares the budget over layers (`layer_shares`: the allocator) and
    rates every prompt token per KV head (`scores`: the scorer). Sinks and the recent window are forced after
    scoring, the highest scores fill the rest, and dropped tokens are dropped for good (the operation).

    Subclasses set the class attributes, may extend `Args`, and are registered in `kvcache.registry` or through the
    entry-point group `longreach.policies`. They never see pages, blocks or vLLM.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    evidence: ClassVar[Evidence] = Evidence.NONE
    query_aware: ClassVar[bool] = False
    """Whether the kept set depends on the prompt's last queries (usually the question)."""
    layer_lengths_differ: ClassVar[bool] = False

    class Args(PolicyArgs):
        """See `PolicyArgs`."""

    args: Any

    def __init__(self, args: PolicyArgs) -> None:
        self.args = args

    @property
    def recent(self) -> int:
        """Last tokens of the prompt that always stay."""
        return 0

    @property
    def query_window(self) -> int:
        """How many of the prompt's last queries the scorer needs; 0 unless `evidence` asks for them."""
        return self.recent if self.evidence is Evidence.WINDOW_QUERIES else 0

    def minimum_budget(self, page_size: int) -> int:
        """Smallest allowed budget in tokens at this page size."""
        return minimum_budget(self.args.sinks, self.recent, page_size)

    def plan(self, prompt_len: int, page_size: int) -> RetentionPlan | None:
        """Sizes for one prompt, or None when nothing is to be dropped; a small ratio is raised to the minimum."""
        budget = max(self.args.budget.resolve(prompt_len), self.minimum_budget(page_size))
        return plan_retention(prompt_len, budget, page_size)

    def layer_shares(self, num_layers: int, budget: int, prompt_len: int) -> torch.Tensor:
        """Allocator: float64 [num_layers] tokens per KV head, with sum exactly `num_layers * budget`."""
        return uniform_shares(num_layers, budget)

    @abstractmethod
    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        """Scorer: float32 [num_kv_heads, prompt_len]; higher stays. Forced tokens may hold anything."""

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """Name, title, paper, needs and argument schema, as JSON-able data."""
        return {
            "name": cls.name,
            "title": cls.title,
            "paper": cls.paper,
            "evidence": cls.evidence.value,
            "query_aware": cls.query_aware,
            "layer_lengths_differ": cls.layer_lengths_differ,
            "description": inspect.cleandoc(cls.__doc__ or ""),
            "arguments": cls.Args.model_json_schema(),
        }
