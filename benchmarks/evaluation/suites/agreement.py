"""How far a greedy answer is the dense one's, and how its next-token distributions differ on the way.

Prompts are real text with an open question, as nobody's benchmark has them. The divergence is taken over the most
likely tokens and a bucket for the rest, up to and with the first token that differs: behind it the contexts differ. The
first token comes from the prompt, which policies and selectors leave dense, so it tells nothing of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from benchmarks.evaluation.haystack import Haystack
from benchmarks.evaluation.suite import Place, Reply, Sample, Scored, Suite, Unscored
from benchmarks.evaluation.tokens import Prompter
from benchmarks.quality.arithmetic import compared, mean_divergence
from benchmarks.quality.selector_cases import OPEN_QUESTION
from benchmarks.quality.texts import make_passage


class Agreement(Suite):
    name = "agreement"
    needs_dense = True

    answer: int = Field(default=64, ge=2, description="tokens of an answer")
    top: int = Field(default=20, ge=1, le=20, description="most likely tokens that are compared (servers allow 20)")

    def tasks_here(self) -> list[str]:
        return ["open question"]

    def make(self, prompter: Prompter, haystack: Haystack, place: Place, variant: str) -> Sample:
        number = place.seed * 100_000 + 50_000 + place.index
        around = len(prompter.prompt(" ", f"\n\n{OPEN_QUESTION}").ids)
        room = place.length - self.answer - around
        document = make_passage(prompter.tokenizer, room, 1, number, text=haystack.text).document
        text = str(prompter.tokenizer.decode(document, skip_special_tokens=True))
        prompt = prompter.prompt(text, f"\n\n{OPEN_QUESTION}")
        request = {"logprobs": self.top, "ignore_eos": True}
        return Sample(place, prompt, self.answer, request=request)

    def rate(self, sample: Sample, reply: Reply, dense: Any) -> Scored:
        """The score is the share of the answer in front of the first token that differs."""
        told = reply.logprobs or {}
        tokens, top = told.get("tokens") or [], told.get("top_logprobs") or []
        if len(tokens) < 2 or len(top) != len(tokens):
            raise Unscored("the answer has no log probabilities (`logprobs`)")
        if dense is None:
            return Scored(1.0, keep={"tokens": tokens, "top": [_rounded(step) for step in top]})
        there = dense["tokens"]
        first = next((i for i, (a, b) in enumerate(zip(there, tokens, strict=False)) if a != b), len(there))
        same = compared(there, tokens)
        measures = {"first_difference": float(first)}
        if same > 1:
            measures["kl"] = mean_divergence(dense["top"][1:same], top[1:same])
        return Scored(first / len(there), measures)


def _rounded(step: Mapping[str, float]) -> dict[str, float]:
    return {token: round(value, 5) for token, value in step.items()}
