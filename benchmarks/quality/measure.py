"""Run one document's prompts under every policy and budget, in a vLLM engine inside this process.

Question known: the whole prompt is compacted, its question too, as in chat. Question unknown: `suffix` hides it from
compaction, and it reads the compacted cache as the answer does. The continuation of a text is always hidden;
teacher-forced, its tokens are a prompt's suffix, and vLLM's `prompt_logprobs` rate them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams

from benchmarks.quality.arithmetic import compared, mean_divergence, tokens_after
from benchmarks.quality.needles import make_multikey
from benchmarks.quality.passkeys import Passkey, depths, make_passkey, render
from benchmarks.quality.texts import make_passage
from kvcache.registry import make_policy
from server.inprocess import InProcessEngine, Job

KNOWN, UNKNOWN = "known", "unknown"
NONE = "none"
ANSWER_TOKENS = 20
CONTINUATION = 96
TOP = 20
"""Most likely tokens of the dense distribution that a divergence is taken over, with one bucket for the rest."""
OTHER_TOP = 100
"""Tokens of the other distribution that are asked for, so that the dense ones are among them."""


@dataclass(frozen=True)
class Case:
    """One prompt.

    Attributes:
        prompt: token ids.
        hidden: how many of the last ones are the question and what follows, or the continuation.
        key: None for a continuation.
    """

    task: str
    prompt: list[int]
    hidden: int
    key: Passkey | None = None

    @property
    def settings(self) -> tuple[str, ...]:
        return (KNOWN, UNKNOWN) if self.key else (UNKNOWN,)


@dataclass(frozen=True)
class Cell:
    """One policy at one budget. `words` has everything but the suffix."""

    policy: str
    budget: str
    words: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """What one request told.

    Attributes:
        kept: share of the tokens that compaction saw that stayed, mean over layers and KV heads.
        found: whether the answer names the key; None for a continuation.
        kl: KL to the dense distribution, nats per token (`arithmetic.divergence`).
        nll: of the continuation, nats per token; `dense_nll` without compression.
    """

    task: str
    setting: str
    policy: str
    budget: str
    tokens: int
    document: int
    kept: float
    found: bool | None
    kl: float
    nll: float | None = None
    dense_nll: float | None = None


def key_case(tokenizer: Any, task: str, key: Passkey) -> Case:
    """The chat prompt of a document with keys; needs a fast tokenizer."""
    text = render(tokenizer, key.content)
    end = text.index(key.document) + len(key.document)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return Case(task, list(encoded["input_ids"]), tokens_after(encoded["offset_mapping"], end), key)


def make_cases(tokenizer: Any, tokens: int, document: int, documents: int, seed: int, keys: int) -> Iterator[Case]:
    """The prompts of one document number, each made when its turn comes; `keys`: in the multi-key document."""
    number = seed * 100_000 + document
    depth = depths(documents)[document]
    yield key_case(tokenizer, "passkey", make_passkey(tokenizer, tokens, depth, number))
    yield key_case(tokenizer, "multi-key", make_multikey(tokenizer, tokens, keys, number))
    passage = make_passage(tokenizer, tokens, CONTINUATION, number)
    yield Case("continuation", passage.document + passage.continuation, CONTINUATION)


def sampling(case: Case, top: int, *, reuse: bool = True) -> SamplingParams:
    """For one request.

    vLLM recomputes a prompt whose log probabilities are asked for unless it is told not to. With the prefix cache
    there are none for the cached part (on CPU: uninitialised ones), which we don't read. `reuse`: False where the
    continuation itself may be cached, since the prompt isn't compacted before it.
    """
    common: dict[str, Any] = {"temperature": 0.0, "detokenize": False, "flat_logprobs": True}
    if case.key:
        return SamplingParams(max_tokens=ANSWER_TOKENS, logprobs=top, **common)
    return SamplingParams(max_tokens=1, prompt_logprobs=top, skip_reading_prefix_cache=not reuse, **common)


def distributions(case: Case, job: Job) -> list[dict[int, float]]:
    """Log probabilities by token id: of the answer's tokens, or of the continuation's but the first.

    The first is predicted by the document's last token, which compaction does not touch.
    """
    if case.key:
        rows: Any = job.output.outputs[0].logprobs
        wanted = range(len(rows))
    else:
        rows = job.output.prompt_logprobs
        wanted = range(len(rows) - case.hidden + 1, len(rows))
    return [{token: entry.logprob for token, entry in rows[position].items()} for position in wanted]


def nll(case: Case, found: Sequence[Mapping[int, float]]) -> float:
    """Of the continuation, nats per token."""
    targets = case.prompt[len(case.prompt) - len(found) :]
    return -sum(row[token] for row, token in zip(found, targets, strict=True)) / len(found)


class Meter:
    """Compares every cell's requests with the dense one of the same prompt."""

    def __init__(self, engine: InProcessEngine, cells: Sequence[Cell]) -> None:
        self.engine, self.cells = engine, cells

    def measure(self, cases: Sequence[Case], tokens: int, document: int, done: Callable[[], None]) -> list[Row]:
        """Everything of these cases at once; their dense runs come first and fill the prefix cache for the others."""
        # So that of the dense run, too, only the continuation's log probabilities are computed.
        texts = [case.prompt[: -case.hidden] for case in cases if not case.key]
        self.engine.run([Job(text, SamplingParams(max_tokens=1), {"policy": NONE}) for text in texts])
        dense = [Job(case.prompt, sampling(case, TOP), {"policy": NONE}) for case in cases]
        self.engine.run(dense, lambda _: done())
        jobs = [self._jobs(case) for case in cases]
        self.engine.run([job for by_cell in jobs for _, _, job in by_cell], lambda _: done())
        at, plain = {"tokens": tokens, "document": document}, Cell(NONE, "100%", {})
        rows = []
        for case, alone, by_cell in zip(cases, dense, jobs, strict=True):
            rows += [self._row(case, alone, alone, plain, setting, at) for setting in case.settings]
            rows += [self._row(case, alone, job, cell, setting, at) for cell, setting, job in by_cell]
        return rows

    def _jobs(self, case: Case) -> list[tuple[Cell, str, Job]]:
        """One for every cell in every setting."""
        jobs = []
        for cell in self.cells:
            for setting in case.settings:
                words = {**cell.words, "suffix": case.hidden if setting == UNKNOWN else 0}
                policy = make_policy(words)
                plan = policy.plan(len(case.prompt), self.engine.page_size) if policy else None
                compacts = plan is not None and plan.prompt_len < len(case.prompt)
                jobs.append((cell, setting, Job(case.prompt, sampling(case, OTHER_TOP, reuse=compacts), words)))
        return jobs

    def _row(self, case: Case, dense: Job, job: Job, cell: Cell, setting: str, at: Mapping[str, int]) -> Row:
        hidden = case.hidden if setting == UNKNOWN else 0
        usage = job.usage
        seen = usage.get("compacted_tokens", len(case.prompt))  # more than the prompt where answers are compacted, too
        kept = (usage["kept_tokens"]["mean"] - hidden) / (seen - hidden)
        common: dict[str, Any] = {
            "task": case.task, "setting": setting, "policy": cell.policy, "budget": cell.budget, "kept": kept, **at,
        }  # fmt: skip
        there, here = distributions(case, dense), distributions(case, job)
        if case.key:
            same = compared(dense.tokens, job.tokens)
            text = self.engine.tokenizer.decode(job.tokens, skip_special_tokens=True)
            return Row(**common, found=case.key.found_in(text), kl=mean_divergence(there[:same], here[:same]))
        both = nll(case, here), nll(case, there)
        return Row(**common, found=None, kl=mean_divergence(there, here), nll=both[0], dense_nll=both[1])
