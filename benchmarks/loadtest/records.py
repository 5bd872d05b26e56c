"""What became of each request, and when it was good."""

from __future__ import annotations

from dataclasses import dataclass

DONE, UNFINISHED, FAILED, NOT_SENT = "done", "unfinished", "failed", "not sent"


@dataclass(frozen=True)
class Goals:
    """What a good request keeps, in seconds: time to first token, and time per token after it."""

    ttft: float = 10.0
    tpot: float = 0.05


@dataclass
class Record:
    """One request. Seconds; `arrival` and `sent` since the load began, the others since `arrival`.

    Attributes:
        status: only of those that are `done` are all times known. `unfinished`: its time was up.
        ttft: of requests without a first token, None.
        prompt_tokens, output_tokens: as the server counts; `asked_...` as we do.
    """

    conversation: int
    turn: int
    asked_prompt: int
    asked_output: int
    arrival: float
    sent: float | None = None
    status: str = NOT_SENT
    ttft: float | None = None
    tpot: float | None = None
    seconds: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    error: str | None = None

    def good(self, goals: Goals) -> bool:
        if self.status != DONE or self.ttft is None:
            return False
        return self.ttft <= goals.ttft and (self.tpot or 0.0) <= goals.tpot
