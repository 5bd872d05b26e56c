"""One needle at a known depth: `needle` in running text (for heat maps), `passkey` in varied prose."""

from __future__ import annotations

import random
from typing import Any

from pydantic import Field

from benchmarks.evaluation.fitting import Draft, fit
from benchmarks.evaluation.haystack import Haystack, noise
from benchmarks.evaluation.metrics import string_match_all
from benchmarks.evaluation.ruler.niah import hide, intro, needle, question
from benchmarks.evaluation.suite import Place, Reply, Sample, Scored, Suite
from benchmarks.evaluation.tokens import Prompter
from benchmarks.evaluation.words import numbers, word_names
from benchmarks.quality.passkeys import Passkey, depths, make_passkey

ANSWER_TOKENS = 32


class _AtDepths(Suite):
    depths: int = Field(default=10, ge=1, description="evenly spread; `samples` documents at each")

    def indices(self, task: str) -> range:
        return range(self.depths * self.samples)

    def depth(self, place: Place) -> float:
        return depths(self.depths)[place.index % self.depths]


class Needle(_AtDepths):
    """One number in running text (G. Kamradt's needle in a haystack; rated by string match)."""

    name = "needle"

    def tasks_here(self) -> list[str]:
        return ["needle"]

    def make(self, prompter: Prompter, haystack: Haystack, place: Place, variant: str) -> Sample:
        depth = self.depth(place)

        def build(units: int, padding: int) -> Draft:
            rng = random.Random(place.words)
            (key,), (value,), where = word_names(rng, 1), numbers(rng, 1), rng.random()
            lines = hide(haystack.sentences(units, where) + noise(padding), [needle(key, value, "numbers")], [depth])
            tail, begun = question([key], "numbers", False)
            return Draft(intro("numbers") + " ".join(lines), tail, (value,), begun, {"depth": depth})

        fitted = fit(prompter, build, place.length - ANSWER_TOKENS)
        return Sample(place, fitted.prompt, ANSWER_TOKENS, fitted.draft.answers, info=fitted.draft.info)

    def rate(self, sample: Sample, reply: Reply, dense: Any) -> Scored:
        return Scored(string_match_all(reply.text, sample.answers))


class PasskeySuite(_AtDepths):
    """A five-digit key in sentences of a small grammar (`benchmarks.quality.passkeys`)."""

    name = "passkey"

    def tasks_here(self) -> list[str]:
        return ["passkey"]

    def make(self, prompter: Prompter, haystack: Haystack, place: Place, variant: str) -> Sample:
        depth = self.depth(place)
        number = place.seed * 100_000 + place.index
        case = make_passkey(prompter.tokenizer, place.length - ANSWER_TOKENS, depth, number)
        prompt = prompter.prompt(case.document, f"\n\n{case.question}")
        return Sample(place, prompt, ANSWER_TOKENS, (case.answer,), info={"depth": depth})

    def rate(self, sample: Sample, reply: Reply, dense: Any) -> Scored:
        case = Passkey("", "", sample.answers[0], 0.0, 0, 0, "")
        return Scored(float(case.found_in(reply.text)))
