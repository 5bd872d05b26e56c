"""Seconds to the first token and per token after it, one request at a time, prompts that no prefix cache knows."""

from __future__ import annotations

import hashlib
from typing import Any

from pydantic import Field

from benchmarks.evaluation.haystack import Haystack
from benchmarks.evaluation.suite import KNOWN, Place, Reply, Sample, Scored, Suite, Unscored
from benchmarks.evaluation.tokens import Prompt, Prompter
from benchmarks.quality.texts import make_passage


class Speed(Suite):
    name = "speed"
    alone = True
    fresh = True
    questions = (KNOWN,)

    answer: int = Field(default=32, ge=2, description="tokens of an answer")

    def tasks_here(self) -> list[str]:
        return ["speed"]

    def make(self, prompter: Prompter, haystack: Haystack, place: Place, variant: str) -> Sample:
        digest = hashlib.sha256(f"{place.words}/{variant}".encode()).hexdigest()
        room = place.length - self.answer
        first = prompter.encode(f"Text {digest[:24]}\n\n", special=True)
        # Each variant's own text, too: a prompt that begins otherwise has no blocks in the prefix cache.
        document = make_passage(prompter.tokenizer, room, 1, int(digest[:8], 16), text=haystack.text).document
        return Sample(place, Prompt((first + document)[:room], 0), self.answer, request={"ignore_eos": True})

    def rate(self, sample: Sample, reply: Reply, dense: Any) -> Scored:
        tokens = reply.usage.get("completion_tokens") or 0
        if reply.ttft is None or tokens < 2:
            raise Unscored("no tokens came as a stream")
        return Scored(None, {"ttft": reply.ttft, "tpot": (reply.seconds - reply.ttft) / (tokens - 1)})
