"""The policy interface."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field, create_model

from kvcache.allocators.base import EqualHeads, HeadAllocator, LayerAllocator, UniformLayers
from kvcache.budget import Budget
from kvcache.evidence import Evidence, LayerEvidence
from kvcache.merging import Merger
from kvcache.method import Arguments, Method, ModelShape
from kvcache.model import UNKNOWN, ModelFacts
from kvcache.observers.base import Observer
from kvcache.observers.column_sums import ColumnSums
from kvcache.observers.moments import QueryMoments
from kvcache.observers.spectrogram import Spectrogram
from kvcache.observers.window import QueryWindow
from kvcache.plan import RetentionPlan, minimum_budget, plan_retention, whole_pages

MOST_SINKS = 1024
"""First tokens that can be kept for sure."""


class PolicyArgs(Arguments):
    """Arguments that every compressing policy takes. Unknown fields are errors."""

    budget: Budget = Field(1024, validate_default=True)
    sinks: int = Field(
        4, ge=0, le=MOST_SINKS, description="First tokens of the prompt that always stay (attention sinks)."
    )
    suffix: int = Field(
        0,
        ge=0,
        description="Last tokens of the prompt that its compaction neither sees nor drops; the answer's keep them.",
    )
    interval: int = Field(
        0, ge=0, description="Compact again after so many tokens of the answer, in whole pages; 0: never."
    )


class AnswerArgs(PolicyArgs):
    """For policies that are written for long answers."""

    interval: int = Field(
        128, ge=0, description="Compact again after so many tokens of the answer, in whole pages; 0: never."
    )


class Policy(Method):
    """Decides what stays after the prompt.

    A policy rates every prompt token per KV head (`scores`) and names the allocators that share its budget over
    layers (`layers`) and over a layer's heads (`heads`); a request may choose others. Sinks and the recent window are
    forced after scoring, the highest scores fill the rest, and dropped tokens are dropped for good, or merged into kept
    ones where the policy has a `merger`. With an `interval` the same is done again and again while the answer grows,
    over the tokens that were kept and those that came since.

    Subclasses set the class attributes, may extend `Args`, and are registered in `kvcache.registry` or through the
    entry-point group `longreach.policies`. They never see pages, blocks or vLLM. `Args` and `evidence` take in those
    of the allocators by themselves.
    """

    query_aware: ClassVar[bool] = False
    """Whether the kept set depends on the prompt's last queries (usually the question)."""
    layers: ClassVar[type[LayerAllocator]] = UniformLayers
    heads: ClassVar[type[HeadAllocator]] = EqualHeads

    class Args(PolicyArgs):
        """See `PolicyArgs`."""

    own_args: ClassVar[type[PolicyArgs]] = Args
    """`Args` without those of the allocators."""
    own_evidence: ClassVar[Evidence] = Evidence.NONE
    """`evidence` without that of the allocators."""
    needs: ClassVar[frozenset[Evidence]] = frozenset()
    """All evidence that the scorer and the allocators need; `evidence` is the costliest."""
    heads_alone: ClassVar[bool] = False
    """Whether a KV head's scores, and what is carried, depend on that head's evidence alone, whichever layer it is of:
    several layers may then come as one with more heads, which saves a GPU many small steps."""
    watches_answers: ClassVar[bool] = False
    """Whether the policy has its own `answer_observers`, for evidence that is gathered from the answer too."""
    args: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.own_evidence = cls.__dict__.get("evidence", cls.own_evidence)
        cls.needs = frozenset({cls.own_evidence, cls.layers.evidence, cls.heads.evidence})
        cls.evidence = Evidence.costliest(*cls.needs)
        cls.own_args = cls.__dict__.get("Args", cls.own_args)
        parts: tuple[type[Arguments], ...] = (cls.layers.Args, cls.heads.Args)
        missing = [part for part in parts if not part.model_fields.keys() <= cls.own_args.model_fields.keys()]
        if missing:
            cls.Args = create_model(f"{cls.__name__}Args", __base__=(cls.own_args, *missing))  # type: ignore
        else:
            cls.Args = cls.own_args  # type: ignore

    def __init__(self, args: PolicyArgs) -> None:
        self.args = args
        self.layer_allocator, self.head_allocator = self.layers(args), self.heads(args)

    @property
    def recent(self) -> int:
        """Last tokens of the prompt that always stay: the argument `recent` where there is one."""
        return int(getattr(self.args, "recent", 0))

    def recent_of(self, tokens: torch.Tensor) -> int | torch.Tensor:
        """As `recent`, for policies in which it depends on how much stays.

        Args:
            tokens: int64 [...], on the CPU: what each KV head keeps, the prompt's tail included.

        Returns:
            Whole numbers, one for all or of the shape of `tokens`; with the sinks no more than `tokens`.
        """
        return self.recent

    @property
    def merger(self) -> Merger | None:
        """What becomes of dropped tokens: folded into kept ones by this, or just dropped."""
        return None

    @property
    def query_window(self) -> int:
        """How many of the prompt's last queries are needed; 0 unless `needs` has them."""
        if Evidence.WINDOW_QUERIES not in self.needs:
            return 0
        return int(getattr(self.args, "window", self.recent))

    def observers(self, num_layers: int, prompt_len: int, model: ModelFacts = UNKNOWN) -> tuple[Observer, ...]:
        """What watches a prompt for this policy, made anew for each: one for each kind of evidence in `needs`.

        Args:
            model: without the running model's facts an observer can tell what it wants, not observe.
        """
        found: list[Observer] = []
        if self.query_window:
            found.append(QueryWindow(num_layers, self.query_window, prompt_len))
        if Evidence.COLUMN_SUMS in self.needs:
            found.append(ColumnSums(num_layers, prompt_len))
        if Evidence.QUERY_MOMENTS in self.needs:
            found.append(QueryMoments(num_layers, prompt_len, model))
        if Evidence.SPECTROGRAMS in self.needs:
            found.append(Spectrogram(num_layers, prompt_len, model))
        return tuple(found)

    def check_model(self, model: ModelShape | None) -> None:
        self.layer_allocator.check_model(model)
        self.head_allocator.check_model(model)

    @classmethod
    def repeats(cls) -> bool:
        """Whether it can compact again while the answer grows: heads of equal length, evidence that can be had then."""
        lasting = {Evidence.NONE, Evidence.KEYS, Evidence.WINDOW_QUERIES}
        return cls.heads is EqualHeads and (cls.watches_answers or cls.needs <= lasting)

    def answer_observers(self, num_layers: int, begin: int, end: int) -> tuple[Observer, ...]:
        """What watches tokens begin ... end - 1 before they are compacted at `end`; only asked where `repeats`.

        Behind a prompt that ends inside a page the first interval is shorter, maybe than the window: then it watches
        all of it.
        """
        return (QueryWindow(num_layers, min(self.query_window, end - begin), end),) if self.query_window else ()

    @property
    def least_interval(self) -> int:
        """Smallest interval in tokens: what watches an answer starts anew after each compaction."""
        end = 1 << 40  # far enough from the beginning for any window
        return max((end - observer.first for observer in self.answer_observers(0, 0, end)), default=1)

    def first_query(self, prompt_len: int) -> int:
        """Where observation starts: tokens from here on must be computed, whatever the prefix cache has."""
        return min([prompt_len - 1, *(observer.first for observer in self.observers(0, prompt_len))])

    @property
    def question(self) -> int:
        """Last tokens of the prompt that compactions of its answer keep: the suffix, which its own doesn't see."""
        return self.args.suffix if getattr(self.args, "interval", 0) else 0

    def minimum_budget(self, page_size: int) -> int:
        """Smallest allowed budget in tokens at this page size."""
        return minimum_budget(self.args.sinks + self.question, max(self.recent, self.query_window), page_size)

    def plan(self, prompt_len: int, page_size: int) -> RetentionPlan | None:
        """Sizes for one prompt, or None when nothing is to be dropped; a small ratio is raised to the minimum.

        The suffix comes after the compaction: it reads what is left, as the answer does, and later compactions keep it.
        """
        seen = prompt_len - self.args.suffix
        question = min(self.question, prompt_len)
        least = self.minimum_budget(page_size) - (self.question - question)
        budget = max(self.args.budget.resolve(max(seen, 1)), least)
        interval = whole_pages(self.args.interval, page_size)
        if interval and seen <= budget:
            # The answer has to grow first: until the budget and an interval are full.
            seen = max(whole_pages(budget, page_size), whole_pages(prompt_len + 1, page_size)) + interval
        plan = plan_retention(seen, budget, page_size) if seen > budget else None
        if plan is None:
            return None
        stays = (prompt_len - question, prompt_len) if question else (0, 0)
        return replace(plan, pinned=self.args.sinks, interval=interval, question=stays)

    def carry(self, evidence: LayerEvidence) -> torch.Tensor | None:
        """What to remember of each token until the next compaction: float32 [num_kv_heads, n], or None.

        What was remembered comes back as `evidence.history`.
        """
        return None

    @abstractmethod
    def scores(self, evidence: LayerEvidence) -> torch.Tensor:
        """Scorer: float32 [num_kv_heads, prompt_len]; higher stays. Forced tokens may hold anything."""

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """As a method, and how it shares its budget."""
        return {
            **super().describe(),
            "query_aware": cls.query_aware,
            "repeats": cls.repeats(),
            "layers": cls.layers.name,
            "heads": cls.heads.name,
            "layer_lengths_differ": cls.layers.lengths_differ or cls.heads.decides_layers,
        }
