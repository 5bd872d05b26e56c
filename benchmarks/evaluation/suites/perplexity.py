"""Perplexity of real text's continuation over a compacted document, teacher-forced.

The prompt is document and continuation, with the continuation as `suffix`, so that it is computed over what the policy
kept. `echo` with `logprobs`, which OpenAI's completions had and vLLM has, rates the prompt's tokens. The
continuation's first token is left out: the document's last token predicts it, before compaction.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field

from benchmarks.evaluation.haystack import Haystack
from benchmarks.evaluation.suite import UNKNOWN, Place, Reply, Sample, Scored, Suite, Unscored
from benchmarks.evaluation.tokens import Prompt, Prompter
from benchmarks.evaluation.variants import SELECTOR
from benchmarks.quality.arithmetic import likelihood_score
from benchmarks.quality.texts import make_passage


class Perplexity(Suite):
    name = "perplexity"
    needs_dense = True
    questions = (UNKNOWN,)
    skips = (SELECTOR,)  # prompts are always read whole

    continuation: int = Field(default=96, ge=2, description="tokens that are rated")

    def tasks_here(self) -> list[str]:
        return ["continuation"]

    def make(self, prompter: Prompter, haystack: Haystack, place: Place, variant: str) -> Sample:
        number = place.seed * 100_000 + place.index
        tokens = place.length - 1
        passage = make_passage(prompter.tokenizer, tokens, self.continuation, number, text=haystack.text)
        prompt = Prompt(passage.document + passage.continuation, self.continuation)
        return Sample(place, prompt, 1, request={"echo": True, "logprobs": 0})

    def rate(self, sample: Sample, reply: Reply, dense: Any) -> Scored:
        """The score is dense perplexity over this one, at most 1: how much of the prediction is left."""
        rated = (reply.logprobs or {}).get("token_logprobs") or []
        end = len(sample.prompt.ids)
        own = rated[end - self.continuation + 1 : end]
        if len(own) < self.continuation - 1 or None in own:
            raise Unscored("the answer has no log probabilities of the prompt (`echo` with `logprobs`)")
        nll = -sum(own) / len(own)
        score = 1.0 if dense is None else likelihood_score(dense, nll)
        return Scored(score, {"nll": nll, "perplexity": math.exp(nll)}, keep=nll)
