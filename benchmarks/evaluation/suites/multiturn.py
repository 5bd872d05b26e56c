"""Several questions over one document: it is compacted once, for none of them, and each finds what was kept.

Each question is a request with the same document in front. With `suffix` over the question, a policy keeps the same
tokens for all of them, as if the document had been compacted once and asked many times; the document itself is found in
the prefix cache.
"""

from __future__ import annotations

import random
from typing import Any

from pydantic import Field

from benchmarks.evaluation.fitting import Draft, fit
from benchmarks.evaluation.haystack import Haystack, noise
from benchmarks.evaluation.metrics import string_match_all
from benchmarks.evaluation.ruler.niah import hide, intro, needle, question
from benchmarks.evaluation.suite import UNKNOWN, Place, Reply, Sample, Scored, Suite
from benchmarks.evaluation.tokens import Prompter
from benchmarks.evaluation.words import numbers, word_names

ANSWER_TOKENS = 32


class MultiTurn(Suite):
    name = "multiturn"
    questions = (UNKNOWN,)

    turns: int = Field(default=4, ge=2, description="questions to each document; its needles are as many")

    def tasks_here(self) -> list[str]:
        return ["multiturn"]

    def indices(self, task: str) -> range:
        return range(self.samples * self.turns)

    def make(self, prompter: Prompter, haystack: Haystack, place: Place, variant: str) -> Sample:
        document, turn = divmod(place.index, self.turns)
        seed = Place(place.suite, place.task, place.length, place.seed, document).words

        def draft(asked: int, units: int, padding: int) -> Draft:
            rng = random.Random(seed)
            keys, values = word_names(rng, self.turns), numbers(rng, self.turns)
            lines = haystack.sentences(units, rng.random()) + noise(padding)
            needles = [needle(key, value, "numbers") for key, value in zip(keys, values, strict=True)]
            lines = hide(lines, needles, [(number + 0.5) / self.turns for number in range(self.turns)])
            order = rng.sample(range(self.turns), self.turns)
            own = order[asked]
            tail, begun = question([keys[own]], "numbers", False)
            info = {"turn": asked + 1, "depth": (own + 0.5) / self.turns}
            return Draft(intro("numbers") + " ".join(lines), tail, (values[own],), begun, info)

        # All questions share one document, which leaves room for the longest of them.
        drafts = [draft(number, 0, 0) for number in range(self.turns)]
        longest = max(range(self.turns), key=lambda number: len(prompter.encode(drafts[number].tail * 2)))
        room = place.length - ANSWER_TOKENS
        fitted = fit(prompter, lambda units, padding: draft(longest, units, padding), room)
        own = draft(turn, fitted.units, fitted.padding)
        prompt = prompter.prompt(own.head, own.tail, own.begun)
        return Sample(place, prompt, ANSWER_TOKENS, own.answers, info=own.info)

    def rate(self, sample: Sample, reply: Reply, dense: Any) -> Scored:
        return Scored(string_match_all(reply.text, sample.answers))
