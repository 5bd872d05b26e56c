"""What a soak asks for: random requests of every kind that the server takes, and canaries that never change."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

POLICIES: list[dict[str, Any]] = [
    {"policy": "none"},
    {"policy": "snapkv", "budget": 256},
    {"policy": "snapkv", "budget": "30%"},
    {"policy": "pyramidkv", "budget": 384},
    {"policy": "adakv", "budget": 256},
    {"policy": "l2norm", "budget": 384},
    {"policy": "streamingllm", "budget": 160},
    {"policy": "random", "budget": 200},
    {"policy": "h2o", "budget": 256},
    {"policy": "expectedattention", "budget": 320},
    {"policy": "streamingllm", "budget": 160, "interval": 32},
    {"policy": "snapkv", "budget": 256, "suffix": 40},
    {"policy": "snapkv", "budget": 256, "suffix": 24, "interval": 64},
    {"policy": "raas", "budget": 192, "interval": 64},
    {"policy": "l2norm", "budget": "25%", "interval": 64},
]
SELECTORS: list[dict[str, Any]] = [
    {"selector": "recycled", "stride": 8},
    {"selector": "quest"},
    {"selector": "tidal"},
    {"selector": "lessismore"},
    {"selector": "recycled", "stride": 64, "similarity": 0.8},
]
WHOLE_CACHES = ("tidal", "lessismore")
"""Selectors that go with no policy."""
STREAMING: dict[str, Any] = {"pattern": "streaming", "sinks": 64, "window": 256, "min_context": 300}
PATTERNS: list[dict[str, Any]] = [
    {"pattern": "xattention", "threshold": 0.7, "min_context": 300},
    STREAMING,
    {"pattern": "delta", "gamma": 32, "base": STREAMING},
    {"pattern": "strided", "local": 2, "min_context": 300},
]
"""Those that any cut into chunks leaves alone: others answer differently in a batch, as documented."""
REFUSED: list[dict[str, Any]] = [
    {"kv_cache": {"policy": "snapkv", "budget": 1}},
    {"kv_cache": {"policy": "nobody"}},
    {"decode_attention": {"selector": "quest", "tokens": -1}},
    {"prefill_attention": {"pattern": "streaming", "window": "wide"}},
    {"temperature": -1},
    {"prompt": [1] * 100_000},
]
"""Fields that make a request a 400."""
OURS = ("kv_cache", "decode_attention", "prefill_attention")
"""Fields that vLLM's own server doesn't know."""
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}


@dataclass(frozen=True)
class Features:
    """What the server takes.

    Attributes:
        model: its name; `adapters`: names of LoRA adapters.
        longest: tokens of a prompt, at most; `answer`: of an answer.
        vocabulary: ids below this one are in prompts.
        selectors: that it has enabled.
        policies: that can be had.
        patterns: whether there are any.
        priorities: whether it schedules by them.
        prompt_logprobs: whether it can tell those.
        stock: whether it is vLLM's own server, which gets neither fields of ours nor, as its engine on CPUs would end
            of them, seeds.
    """

    model: str
    longest: int
    answer: int
    vocabulary: int
    adapters: tuple[str, ...] = ()
    selectors: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    patterns: bool = True
    priorities: bool = False
    prompt_logprobs: bool = True
    stock: bool = False


@dataclass
class Ask:
    """A request.

    Attributes:
        kind: for counting.
        path: of the endpoint.
        body: JSON.
        cut_after: a client that leaves after so many chunks of its stream; None: stays.
        cut_seconds: a client that leaves after so many seconds, maybe before anything has come.
        refused: whether a 400 is the answer.
        budget: tokens that may be kept per layer and KV head, at most, of so long a prompt; None: no limit known.
    """

    kind: str
    path: str
    body: dict[str, Any]
    cut_after: int | None = None
    cut_seconds: float | None = None
    refused: bool = False
    budget: int | None = None
    tags: tuple[str, ...] = field(default=())


class Mix:
    """Draws requests; the same seed gives the same ones."""

    def __init__(self, features: Features, seed: int) -> None:
        self.features, self.choose = features, random.Random(seed)
        self.shared = [self.tokens(features.longest // 2) for _ in range(4)]

    def tokens(self, number: int) -> list[int]:
        return [self.choose.randrange(100, self.features.vocabulary) for _ in range(number)]

    def prompt(self) -> list[int]:
        """20 tokens to the longest, most of them short; every third begins like others."""
        longest = self.features.longest
        length = int(20 * (longest / 20) ** self.choose.random())
        if self.choose.random() < 0.35:
            begin = self.choose.choice(self.shared)
            return (begin[: self.choose.randrange(16, len(begin) + 1)] + self.tokens(length))[:longest]
        return self.tokens(length)

    def draw(self) -> Ask:
        """The next request."""
        choose, features = self.choose, self.features
        body: dict[str, Any] = {
            "model": features.model,
            "max_tokens": choose.randrange(2, features.answer),
            "temperature": 0,
            "ignore_eos": choose.random() < 0.7,
        }
        if choose.random() < 0.06:
            known = [words for words in REFUSED if not (features.stock and words.keys() & set(OURS))]
            body |= {"prompt": self.tokens(40), **choose.choice(known)}
            return Ask("refused", "/v1/completions", body, refused=True)
        tags = self._words(body)
        if features.adapters and choose.random() < 0.2:
            body["model"] = choose.choice(features.adapters)
            tags.append("adapter")
        if features.priorities:
            body["priority"] = choose.choice((0, 0, 0, 1, 5))
        if choose.random() < 0.12:
            return self._structured(body, tags)
        body["prompt"] = self.prompt()
        self._extras(body, tags)
        ask = Ask("completion", "/v1/completions", body, budget=_budget(body))
        kind = choose.random()
        if kind < 0.5:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            if body.pop("prompt_logprobs", None):  # vLLM has none in streams
                tags.remove("prompt logprobs")
            ask.kind = "stream"
            if kind < 0.2:
                ask.kind, ask.cut_after = "cut stream", choose.randrange(1, max(2, body["max_tokens"] // 2))
        elif kind < 0.6:
            ask.kind, ask.cut_seconds = "aborted", choose.choice((0.01, 0.1, 0.5, 2.0, 5.0))
        ask.tags = tuple(tags)
        return ask

    def _words(self, body: dict[str, Any]) -> list[str]:
        """Policy, selector and pattern; their names."""
        if self.features.stock:
            return []
        choose, features, tags = self.choose, self.features, []
        policy = choose.choice([words for words in POLICIES if words["policy"] in ("none", *features.policies)])
        body["kv_cache"] = policy
        tags.append(f"policy {policy['policy']}{' again' if policy.get('interval') else ''}")
        enabled = [words for words in SELECTORS if words["selector"] in features.selectors]
        if policy["policy"] != "none":
            enabled = [words for words in enabled if words["selector"] not in WHOLE_CACHES]
        if enabled and choose.random() < 0.4:
            words = choose.choice(enabled)
            body["decode_attention"] = {"tokens": 128, "min_context": 0, **words}
            tags.append(f"selector {words['selector']}")
        if features.patterns and choose.random() < 0.25:
            words = choose.choice(PATTERNS)
            body["prefill_attention"] = words
            tags.append(f"pattern {words['pattern']}")
        return tags

    def _extras(self, body: dict[str, Any], tags: list[str]) -> None:
        choose, features = self.choose, self.features
        if choose.random() < 0.15:
            body |= {"n": choose.choice((2, 3)), "temperature": 1.2}
            if not features.stock:
                body["seed"] = choose.randrange(1 << 30)
            tags.append("n")
        if choose.random() < 0.15:
            body["logprobs"] = choose.choice((1, 4))
            tags.append("logprobs")
        if features.prompt_logprobs and choose.random() < 0.05:
            body["prompt_logprobs"] = 1
            tags.append("prompt logprobs")
        if choose.random() < 0.1:
            body |= {"stop": ["e", "."], "ignore_eos": False}
            tags.append("stop")
        if choose.random() < 0.05:
            body["cache_salt"] = choose.choice(("one", "another"))
            tags.append("salt")

    def _structured(self, body: dict[str, Any], tags: list[str]) -> Ask:
        text = " ".join(
            f"Guest {i} is {self.choose.randrange(90)} years old." for i in range(self.choose.randrange(90))
        )
        body |= {
            "messages": [{"role": "user", "content": f"{text} Who is the oldest?"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "guest", "schema": SCHEMA}},
            "max_tokens": max(40, body["max_tokens"]),
        }
        return Ask("structured", "/v1/chat/completions", body, tags=tuple(tags))


def _budget(body: dict[str, Any]) -> int | None:
    """What the documented formula allows to stay of a completion's prompt (docs/settings.md), its suffix included."""
    words = body.get("kv_cache", {"policy": "none"})
    if not isinstance(words.get("budget"), int) or words.get("interval"):
        return None
    return max(int(words["budget"]), 0) + int(words.get("suffix", 0))


def canaries(features: Features) -> dict[str, dict[str, Any]]:
    """Bodies of completions, by name, whose answers are always the same."""
    choose = random.Random(4711)
    longest = min(features.longest, 700)
    prompt = [choose.randrange(100, features.vocabulary) for _ in range(longest)]
    base = {"model": features.model, "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, "logprobs": 2}  # fmt: skip
    if features.stock:
        return {"whole": base}
    found: dict[str, dict[str, Any]] = {"whole": {**base, "kv_cache": {"policy": "none"}}}
    if features.policies:
        found["compacted"] = {**base, "kv_cache": {"policy": "snapkv", "budget": 256}}
        found["compacted again"] = {
            **base, "kv_cache": {"policy": "streamingllm", "budget": 160, "interval": 32}, "max_tokens": 48,
        }  # fmt: skip
    if "quest" in features.selectors:
        found["selected"] = {**base, "decode_attention": {"selector": "quest", "tokens": 128, "min_context": 0}}
    if features.patterns:
        found["pattern"] = {**base, "prefill_attention": STREAMING}
    if features.adapters:
        found["adapter"] = {**base, "model": features.adapters[0]}
    return found
