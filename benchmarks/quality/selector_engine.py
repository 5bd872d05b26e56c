"""Many requests at once through an engine in this process, each step's tokens and log probabilities seen on their way.

vLLM's outputs make a Python object of every log probability; those of a whole vocabulary would take minutes. They leave
the engine's core as arrays, so they are taken there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from attention_plugins.decode.registry import FIELD, make_selector
from attention_plugins.decode.schedule import CROWDED
from attention_plugins.prefill.registry import FIELD as PREFILL_FIELD
from benchmarks.quality.expect import parse_policy
from kvcache.registry import make_policy
from kvcache.vllm_adapter.scheduler import EXTRA_ARG
from server.inprocess import InProcessEngine

DENSE = "dense"
Array = NDArray[np.float32]
See = Callable[[int, int, int, Array | None], bool]
"""`see(request, step, token, log probabilities)`: whether the request is to go on."""


@dataclass(frozen=True)
class Cell:
    """One way to answer all prompts.

    Attributes:
        kind: of its name, `selector`, `policy`, `pattern` or `dense`.
        label: as on the command line.
        tokens: K, or the budget; 0 for dense and for patterns.
        words: what the request asks for.
    """

    kind: str
    label: str
    tokens: int
    words: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.label.partition(",")[0]

    @property
    def extra_args(self) -> dict[str, Any]:
        return {} if self.kind == DENSE else {FIELDS[self.kind]: dict(self.words)}


FIELDS = {"selector": FIELD, "policy": EXTRA_ARG, "pattern": PREFILL_FIELD}
PLAIN = Cell(DENSE, DENSE, 0, {})


def make_cells(selectors: Sequence[str], policies: Sequence[str], budgets: Sequence[int]) -> list[Cell]:
    """Every selector and policy at every K.

    Raises:
        ValueError: one of them can't be made; before an engine starts.
    """
    cells = []
    for kind, labels in (("selector", selectors), ("policy", policies)):
        for label in dict.fromkeys(labels):
            parsed = parse_policy(label)
            if parsed.budget is not None:
                raise ValueError(f"{label!r}: budgets are given for all, not by name")
            for tokens in budgets:
                if kind == "selector":
                    words = {"selector": parsed.name, "tokens": tokens, "min_context": 0, **parsed.args}
                    make_selector(words)
                else:
                    words = {"policy": parsed.name, "budget": tokens, **parsed.args}
                    make_policy(words)
                cells.append(Cell(kind, label, tokens, words))
    return cells


def whole_distribution(ids: NDArray[Any], values: NDArray[Any]) -> Array:
    """Log probabilities by token id, from vLLM's lists: the sampled token, then all, most likely first."""
    found = np.full(int(ids.max()) + 1, -np.inf, dtype=np.float32)
    found[ids[1:]] = values[1:]
    if not np.isfinite(found).all():
        raise ValueError("not every token of the vocabulary has a log probability")
    return found


class Driver:
    """Runs batches; no request reads more than its selector lets it."""

    def __init__(self, engine: InProcessEngine, states: int) -> None:
        """
        Args:
            states: most requests of a batch, so that all can select.
        """
        self.engine, self.states, self._number = engine, states, 0
        self.density: float | None = None
        """Share of the attention that patterns computed of the last run's prompts."""
        self._client: Any = engine.engine.engine_core

    def run(
        self, prompts: Sequence[Sequence[int]], cells: Sequence[Cell], see: See, **params: Any
    ) -> tuple[list[list[int]], Counter[str]]:
        """Answer every prompt in the way of its cell, greedily.

        Args:
            params: vLLM's sampling parameters; `logprobs=-1` for `see` to get a whole distribution.

        Returns:
            The answers' tokens, and how many steps of selectors did what.

        Raises:
            ValueError: vLLM refuses a request, or a step had no room to select in: that would be dense by mistake.
        """
        before, pairs_before = self._steps(), self._pairs()
        answers: list[list[int]] = [[] for _ in prompts]
        for first in range(0, len(prompts), self.states):
            self._batch(range(first, min(first + self.states, len(prompts))), prompts, cells, see, answers, params)
        steps, pairs = self._steps() - before, self._pairs() - pairs_before
        self.density = pairs["pairs_computed"] / pairs["pairs"] if pairs["pairs"] else None
        if steps[CROWDED]:
            raise ValueError(f"{steps[CROWDED]} steps read everything for want of room: a larger KV cache, or --states")
        return answers, steps

    def _batch(
        self,
        batch: range,
        prompts: Sequence[Sequence[int]],
        cells: Sequence[Cell],
        see: See,
        answers: list[list[int]],
        params: Mapping[str, Any],
    ) -> None:
        vllm = self.engine.engine
        running: dict[str, int] = {}
        for index in batch:
            name, self._number = f"ask{self._number}", self._number + 1
            sampling = SamplingParams(
                temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args=cells[index].extra_args, **params,
            )  # fmt: skip
            running[name] = index
            vllm.add_request(name, {"prompt_token_ids": list(prompts[index])}, sampling)
        stop: list[str] = []

        def look(output: Any) -> None:
            name = output.request_id.rpartition("-")[0]  # vLLM adds a suffix to our names
            logprobs, output.new_logprobs = output.new_logprobs, None
            if name not in running:  # one more token, on its way when the request was stopped
                return
            index = running[name]
            for place, token in enumerate(output.new_token_ids):
                found = None
                if logprobs is not None:
                    found = whole_distribution(logprobs.logprob_token_ids[place], logprobs.logprobs[place])
                answers[index].append(token)
                if not see(index, len(answers[index]) - 1, token, found):
                    del running[name]
                    stop.append(name)
                    return

        with self._watched(look):
            while vllm.has_unfinished_requests():
                vllm.step()
                if stop:
                    vllm.abort_request(stop)
                    stop.clear()

    @contextmanager
    def _watched(self, look: Callable[[Any], None]) -> Iterator[None]:
        """`look` gets each request's part of each step before vLLM makes its output of it."""
        get_output = self._client.get_output

        def watched() -> Any:
            outputs = get_output()
            for output in outputs.outputs:
                look(output)
            return outputs

        self._client.get_output = watched
        try:
            yield
        finally:
            del self._client.get_output

    def _steps(self) -> Counter[str]:
        """Of all requests so far."""
        found: Counter[str] = Counter()
        for steps in self._client.engine_core.scheduler.reads.totals.values():
            found.update(steps)
        return found

    def _pairs(self) -> Counter[str]:
        """Of all prompts with patterns so far."""
        found: Counter[str] = Counter()
        for totals in self._client.engine_core.scheduler.prefill_totals.by_pattern.values():
            found.update(totals)
        return found
