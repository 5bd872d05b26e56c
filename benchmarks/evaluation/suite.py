"""What a suite is: it makes samples and rates answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from benchmarks.evaluation.haystack import Haystack
from benchmarks.evaluation.tokens import Prompt, Prompter

KNOWN, UNKNOWN = "known", "unknown"
Question = Literal["known", "unknown"]


@dataclass(frozen=True, order=True)
class Place:
    """Which sample: everything that it is made from."""

    suite: str
    task: str
    length: int
    seed: int
    index: int

    @property
    def words(self) -> str:
        """Seeds the random numbers."""
        return f"{self.suite}/{self.task}/{self.length}/{self.seed}/{self.index}"


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes:
        answers: what the answer is rated by.
        request: fields of the request beside prompt and length.
        info: goes into the row: a depth, a turn, tokens that were cut out.
    """

    place: Place
    prompt: Prompt
    max_tokens: int
    answers: tuple[str, ...] = ()
    request: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What the endpoint answered.

    Attributes:
        logprobs: `choices[0].logprobs`, if asked for.
        ttft: seconds to the first token, of streamed answers.
    """

    text: str
    finish_reason: str | None
    usage: Mapping[str, Any]
    seconds: float
    logprobs: Mapping[str, Any] | None = None
    ttft: float | None = None


@dataclass(frozen=True)
class Scored:
    """What a reply is worth.

    Attributes:
        score: 0 to 1; None where a suite measures something else.
        measures: other figures, by name.
        keep: what has to be remembered of a dense reply to rate others by.
    """

    score: float | None
    measures: Mapping[str, float] = field(default_factory=dict)
    keep: Any = None


class Unscored(Exception):
    """The reply can't be rated, and why: an error of this sample, not a wrong answer."""


class Suite(BaseModel, ABC):
    """Settings of one suite, as a sweep's file names them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    needs_dense: ClassVar[bool] = False
    """Rates by the dense answer to the same sample."""
    alone: ClassVar[bool] = False
    """Measures time: nothing else may run beside a request."""
    fresh: ClassVar[bool] = False
    """Every variant has prompts of its own, which no prefix cache knows."""
    questions: ClassVar[tuple[str, ...]] = (KNOWN, UNKNOWN)
    """Settings of policies that make sense here."""
    skips: ClassVar[tuple[str, ...]] = ()
    """Groups of variants that this suite says nothing of."""

    lengths: list[int] = Field(min_length=1, description="tokens of prompt and answer together")
    samples: int = Field(default=10, ge=1, description="of each task, length and seed")

    @abstractmethod
    def tasks_here(self) -> list[str]: ...

    def indices(self, task: str) -> range:
        return range(self.samples)

    def places(self, seeds: list[int]) -> Iterator[Place]:
        """In the order in which they are asked."""
        for length in self.lengths:
            for task in self.tasks_here():
                for seed in seeds:
                    for index in self.indices(task):
                        yield Place(self.name, task, length, seed, index)

    @abstractmethod
    def make(self, prompter: Prompter, haystack: Haystack, place: Place, variant: str) -> Sample:
        """
        Args:
            variant: whose sample; matters to `fresh` suites alone.

        Raises:
            ValueError: it can't be made.
        """

    @abstractmethod
    def rate(self, sample: Sample, reply: Reply, dense: Any) -> Scored:
        """
        Args:
            dense: what the dense reply's `Scored.keep` was, where `needs_dense`; None for the dense reply itself.

        Raises:
            Unscored: the reply lacks what it is rated by.
        """

    def complete(self, sample: Sample, reply: Reply) -> bool:
        """Whether an answer that was cut at its token limit may be rated. RULER's rule, and the usual one: yes."""
        return True

    def cut(self, prompt: Prompt, room: int) -> Prompt | None:
        """A prompt that is too long for the model, cut as the suite's rules say; None: not to be sent."""
        return None
