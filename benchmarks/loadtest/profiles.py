"""What is asked: profiles of long-context use. One class each; its fields are its arguments."""

from __future__ import annotations

import random
from abc import abstractmethod
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from benchmarks.loadtest.prompts import Conversation, Piece, Turn


class ProfileError(ValueError):
    """There is no such profile, or it doesn't take that argument."""


class Profile(BaseModel):
    """Arguments of a profile, lengths in tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ClassVar[str]
    about: ClassVar[str]
    output: PositiveInt = Field(256, description="tokens of each answer")

    @abstractmethod
    def conversations(self, requests: int, seed: int) -> list[Conversation]:
        """Of so many requests all together, in the order in which they arrive."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Tokens that the longest request needs, prompt and answer."""

    @property
    @abstractmethod
    def words(self) -> str:
        """What it asks, for headings."""

    @property
    def title(self) -> str:
        """Name and all arguments, as `--profile` takes them."""
        return ",".join([self.name, *(f"{key}={value:g}" for key, value in self.model_dump().items())])


class Independent(Profile):
    """One whose requests don't follow each other."""

    def conversations(self, requests: int, seed: int) -> list[Conversation]:
        return [Conversation((self.turn(number, seed),)) for number in range(requests)]

    @abstractmethod
    def turn(self, number: int, seed: int) -> Turn:
        """The request with this number."""


class Prompts(Independent):
    name = "prompts"
    about = "independent prompts of one length"
    prompt: PositiveInt = Field(2048, description="tokens of each prompt")

    def turn(self, number: int, seed: int) -> Turn:
        return Turn((Piece(f"prompt {number}", self.prompt),), self.output)

    @property
    def words(self) -> str:
        return f"prompts of {self.prompt:,} tokens, answers of {self.output:,}"

    @property
    def longest(self) -> int:
        return self.prompt + self.output


class Document(Independent):
    name = "document"
    about = "one document and many questions about it, then the next document"
    document: PositiveInt = Field(16_384, description="tokens of a document")
    question: PositiveInt = Field(64, description="tokens of a question behind it")
    questions: PositiveInt = Field(20, description="questions about each document")

    def turn(self, number: int, seed: int) -> Turn:
        document = Piece(f"document {number // self.questions}", self.document)
        return Turn((document, Piece(f"question {number}", self.question)), self.output)

    @property
    def words(self) -> str:
        return f"documents of {self.document:,} tokens with {self.questions} questions each, answers of {self.output:,}"

    @property
    def longest(self) -> int:
        return self.document + self.question + self.output


class Prefix(Independent):
    name = "prefix"
    about = "one prefix that all requests share, such as instructions with examples, and a prompt of their own"
    prefix: PositiveInt = Field(8192, description="tokens that all share")
    prompt: PositiveInt = Field(8192, description="tokens of each one's own prompt behind them")

    def turn(self, number: int, seed: int) -> Turn:
        return Turn((Piece("prefix", self.prefix), Piece(f"prompt {number}", self.prompt)), self.output)

    @property
    def words(self) -> str:
        return f"a common prefix of {self.prefix:,} tokens, prompts of {self.prompt:,}, answers of {self.output:,}"

    @property
    def longest(self) -> int:
        return self.prefix + self.prompt + self.output


class Agent(Profile):
    name = "agent"
    about = "conversations that grow, turn by turn, by the answer and by what a tool tells"
    start: PositiveInt = Field(4096, description="tokens of the first prompt")
    step: PositiveInt = Field(8192, description="tokens by which each following prompt is longer, answer included")
    longest_prompt: PositiveInt = Field(100_000, description="tokens of the last prompt at most")
    pause: float = Field(1.0, ge=0, description="seconds from an answer to the next prompt")

    def conversations(self, requests: int, seed: int) -> list[Conversation]:
        """Whole conversations, the last one cut where there are enough requests."""
        lengths = list(range(self.start, max(self.start, self.longest_prompt) + 1, self.step))
        made: list[Conversation] = []
        while requests > 0:
            turns = [self._turn(len(made), length) for length in lengths[:requests]]
            requests -= len(turns)
            made.append(Conversation(tuple(turns), self.pause))
        return made

    def _turn(self, conversation: int, length: int) -> Turn:
        # One label: a longer prompt begins with the shorter one. What stands for the answers is made up, so that
        # all systems get the same prompts whatever they answer.
        return Turn((Piece(f"conversation {conversation}", length),), self.output)

    @property
    def words(self) -> str:
        return f"agents growing from {self.start:,} to {self.longest_prompt:,} tokens, answers of {self.output:,}"

    @property
    def longest(self) -> int:
        return max(self.start, self.longest_prompt) + self.output


class Mixed(Independent):
    name = "mixed"
    about = "short prompts with long ones among them"
    short: PositiveInt = Field(1024, description="tokens of a short prompt")
    long: PositiveInt = Field(32_768, description="tokens of a long one")
    share: float = Field(0.2, ge=0, le=1, description="share of the requests that are long")

    def turn(self, number: int, seed: int) -> Turn:
        is_long = random.Random(f"{seed}/{number}").random() < self.share
        return Turn((Piece(f"prompt {number}", self.long if is_long else self.short),), self.output)

    @property
    def words(self) -> str:
        return f"prompts of {self.short:,} tokens, {self.share:.0%} of {self.long:,}, answers of {self.output:,}"

    @property
    def longest(self) -> int:
        return max(self.short, self.long) + self.output


class Generation(Prompts):
    name = "generation"
    about = "short prompts with long answers"
    prompt: PositiveInt = Field(1024, description="tokens of each prompt")
    output: PositiveInt = Field(4096, description="tokens of each answer")


PROFILES: dict[str, type[Profile]] = {
    profile.name: profile for profile in (Prompts, Document, Prefix, Agent, Mixed, Generation)
}


def parse(text: str) -> Profile:
    """`NAME[,ARGUMENT=NUMBER...]`.

    Raises:
        ProfileError: with what there is.
    """
    name, *words = text.split(",")
    if name not in PROFILES:
        raise ProfileError(f"--profile {name}: there is no such profile, there are {', '.join(PROFILES)}")
    known = PROFILES[name].model_fields
    arguments: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in known or not equals:
            raise ProfileError(f"--profile {name}: {word!r} isn't ARGUMENT=NUMBER; arguments are {', '.join(known)}")
        arguments[key] = value
    try:
        return PROFILES[name](**arguments)
    except ValidationError as error:
        first = error.errors()[0]
        raise ProfileError(f"--profile {name}: {first['loc'][0]}={first['input']}: {first['msg']}") from error


def listing() -> str:
    """All profiles with their arguments, for people."""
    lines = []
    for name, profile in PROFILES.items():
        lines.append(f"{name}\n    {profile.about}")
        for key, field in profile.model_fields.items():
            lines.append(f"      {key} = {field.default:<8} {field.description}")
    return "\n".join(lines)
