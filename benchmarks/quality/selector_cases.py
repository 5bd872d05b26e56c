"""Prompts that show what selectors lose: keys that are asked for at once, late in an answer, or one after another.

The first token of an answer comes from the prompt's pass, which reads everything: selectors matter from the second on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.needles import make_multikey
from benchmarks.quality.passkeys import make_suite, render
from benchmarks.quality.texts import make_passage

PASSKEY, MULTI_KEY, LATE, LIST = "passkey", "multi-key", "late", "list"
ANSWER_TOKENS = {PASSKEY: 24, MULTI_KEY: 24, LATE: 110, LIST: 100}
LEAST_TOKENS = {LATE: 110}
"""Left alone, small models end their answer when they have counted."""
DEPTHS = 8
FAR = 0.75
"""Keys in this first share of a prompt are far back: a window of the last tokens doesn't hold them."""
COUNT = " ".join(str(number) for number in range(1, 31))
LATE_QUESTION = f"Write: {COUNT}. Then: what is the pass key for {{name}}? Answer with the number."
BEGUN = "1 2 3 4 5 6"
"""The prompt begins the answer, else small models name the key at once. It takes some 75 steps to count to the end."""
LIST_QUESTION = "List all the pass keys in the text with their names, in the order of the text."
OPEN_QUESTION = "Explain in your own words what the text above says."
ROOM = 220
"""Tokens that the longest question takes, more than a passkey document's own."""


@dataclass(frozen=True)
class KeyPrompt:
    """One prompt that asks for keys.

    Attributes:
        keys: all numbers that a right answer holds.
        far: those that are far back.
    """

    task: str
    prompt: list[int]
    keys: tuple[str, ...]
    far: frozenset[str] = frozenset()

    def found(self, text: str) -> frozenset[str]:
        """The keys that an answer names, each as a number of its own."""
        return frozenset(self.keys) & set(re.findall(r"(?<!\d)\d+(?!\d)", text))


def encode(tokenizer: Any, content: str, begun: str = "") -> list[int]:
    """A user message as the server sends it to the model, and the first words of the answer."""
    return list(tokenizer(render(tokenizer, content) + begun, add_special_tokens=False)["input_ids"])


def ask(tokenizer: Any, task: str, content: str, keys: tuple[str, ...]) -> KeyPrompt:
    """The prompt of a user message with these keys in it."""
    far = frozenset(key for key in keys if content.rindex(key) < FAR * len(content))
    return KeyPrompt(task, encode(tokenizer, content, BEGUN if task == LATE else ""), keys, far)


def key_prompts(tokenizer: Any, tokens: int, documents: int, keys: int, seed: int) -> list[KeyPrompt]:
    """Of every task as many as there are documents, each of about that many tokens; `passkey` and `late` ask of the
    same documents, and so do `multi-key` and `list`."""
    found = []
    for case in make_suite(tokenizer, tokens - ROOM, documents, DEPTHS, seed):
        name = case.question.removeprefix("What is the pass key for ").partition("?")[0]
        late = LATE_QUESTION.format(name=name)
        found.append(ask(tokenizer, PASSKEY, case.content, (case.answer,)))
        found.append(ask(tokenizer, LATE, f"{case.document}\n\n{late}", (case.answer,)))
    for document in range(documents):
        case = make_multikey(tokenizer, tokens - ROOM, keys, seed * 100_000 + document)
        every = tuple(re.findall(r"The pass key for \w+ is (\d+)\.", case.document))
        found.append(ask(tokenizer, MULTI_KEY, case.content, (case.answer,)))
        found.append(ask(tokenizer, LIST, f"{case.document}\n\n{LIST_QUESTION}", every))
    return sorted(found, key=lambda prompt: list(ANSWER_TOKENS).index(prompt.task))


def open_prompts(tokenizer: Any, tokens: int, prompts: int, seed: int) -> list[list[int]]:
    """Real text in turn with an open question behind it, and to be gone on with."""
    found = []
    for number in range(prompts):
        asks = number % 2 == 0
        length = tokens - 60 if asks else tokens
        passage = make_passage(tokenizer, length + 1, 1, seed * 100_000 + number).document
        text = tokenizer.decode(passage, skip_special_tokens=True)
        found.append(encode(tokenizer, f"{text}\n\n{OPEN_QUESTION}") if asks else passage)
    return found


def longest(prompts: Sequence[Sequence[int]], answer: int, most: int) -> None:
    """Refuse what the model has no room for.

    Raises:
        ValueError: a prompt and its answer are too long.
    """
    needed = max(len(prompt) for prompt in prompts) + answer
    if needed > most:
        raise ValueError(f"a prompt and its answer take {needed} tokens, the model has {most}")
