"""The sections of `benchmarks.quality.selectors`: each makes its prompts, answers them densely, and then cell by cell.

`needles`: keys found among those that dense attention finds. `kl`: along each answer as far as it is the dense one,
the first step where they part included, KL(dense || cell) of the next token over the whole vocabulary, in nats. The
first token counts for patterns alone: it comes from the prompt, which others read whole. Up to a step the tokens are
the same, but the cache behind the prompt is each cell's own, as in use. Answers that part early give few steps, so a
bad cell's figures are of early steps, where it has done least harm. `agreement`: how many tokens of a long answer are
the dense one's; `dense beside others` is dense once more in a larger batch, whose numbers round differently: the noise
floor.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from benchmarks.quality.arithmetic import rounded
from benchmarks.quality.selector_cases import (
    ANSWER_TOKENS,
    LEAST_TOKENS,
    KeyPrompt,
    key_prompts,
    longest,
    open_prompts,
)
from benchmarks.quality.selector_engine import DENSE, PLAIN, Array, Cell, Driver

NEEDLES, KL, AGREEMENT = "needles", "kl", "agreement"
AGAIN = Cell(DENSE, "dense again", 0, {})
BESIDE = Cell(DENSE, "dense beside others", 0, {})
COPIES = 6
"""How often each prompt is answered densely again: a batch as large as those of selectors."""
OTHERS = 2
"""Likewise, how many other requests there are to each of the noise floor's."""
Row = dict[str, Any]
Add = Callable[[Iterable[Row]], None]


def go_on(request: int, step: int, token: int, logprobs: Array | None) -> bool:
    return True


def together(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that share a batch: those of one selector, since a CUDA graph runs one selector; each pattern by itself."""

    def shared(cell: Cell) -> tuple[str, str]:
        return cell.kind, cell.label if cell.kind == "pattern" else cell.name

    return [list(own) for _, own in groupby(cells, key=shared)]


def named(section: str, cell: Cell) -> Row:
    return {"section": section, "kind": cell.kind, "label": cell.label, "tokens": cell.tokens}


def divergence(dense: Array, other: Array) -> float:
    """KL(dense || other) in nats, of log probabilities over the whole vocabulary."""
    wide = dense.astype(np.float64)
    return max(0.0, float((np.exp(wide) * (wide - other)).sum()))


def key_rows(
    prompts: Sequence[KeyPrompt], dense: Sequence[frozenset[str]], cell: Sequence[frozenset[str]]
) -> list[Row]:
    """Of every task: keys that a cell finds among those that dense finds, out of all; and so of those far back. And all
    that it finds: sometimes one that dense doesn't."""
    rows = []
    for task in dict.fromkeys(prompt.task for prompt in prompts):
        own = [index for index, prompt in enumerate(prompts) if prompt.task == task]
        rows.append({
            "task": task,
            "keys": sum(len(prompts[index].keys) for index in own),
            "dense": sum(len(dense[index]) for index in own),
            "found": sum(len(dense[index] & cell[index]) for index in own),
            "found_all": sum(len(cell[index]) for index in own),
            "far_keys": sum(len(prompts[index].far) for index in own),
            "far_dense": sum(len(prompts[index].far & dense[index]) for index in own),
            "far_found": sum(len(prompts[index].far & dense[index] & cell[index]) for index in own),
        })  # fmt: skip
    return rows


def needles(driver: Driver, cells: Sequence[Cell], args: Namespace, add: Add) -> None:
    """One row for every cell and task; a task's budget of tokens is spent whether it needs it or not."""
    tokenizer = driver.engine.tokenizer
    prompts = key_prompts(tokenizer, args.tokens, args.documents, args.keys, args.seed)
    prompts = [prompt for prompt in prompts if prompt.task in args.tasks]
    longest([prompt.prompt for prompt in prompts], max(ANSWER_TOKENS.values()), driver.engine.max_model_len)

    def answers(cell: Cell) -> tuple[list[frozenset[str]], Counter[str], list[float]]:
        """Task by task, since their answers' lengths differ."""
        found, steps, densities = [], Counter[str](), []
        for task, group in groupby(prompts, key=lambda prompt: prompt.task):
            own = list(group)
            limits = {"max_tokens": ANSWER_TOKENS[task], "min_tokens": LEAST_TOKENS.get(task, 0)}
            tokens, done = driver.run([prompt.prompt for prompt in own], [cell] * len(own), go_on, **limits)
            texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in tokens]
            found += [prompt.found(text) for prompt, text in zip(own, texts, strict=True)]
            steps += done
            densities.append(driver.density)
        return found, steps, [density for density in densities if density is not None]

    dense, *_ = answers(PLAIN)
    for cell in cells:
        began = time.perf_counter()
        found, steps, densities = (dense, Counter[str](), []) if cell is PLAIN else answers(cell)
        seconds = time.perf_counter() - began
        common = {**named(NEEDLES, cell), "steps": dict(steps), "seconds": round(seconds, 1)}
        if densities:
            common["density"] = round(statistics.fmean(densities), 4)
        add({**common, **row} for row in key_rows(prompts, dense, found))


def kl(driver: Driver, cells: Sequence[Cell], args: Namespace, add: Add) -> None:
    """One row for every cell; that of `dense again` is the noise of a larger batch."""
    prompts = open_prompts(driver.engine.tokenizer, args.tokens, args.kl_prompts, args.seed)
    longest(prompts, args.kl_tokens, driver.engine.max_model_len)
    told: list[list[Array]] = [[] for _ in prompts]

    def keep(request: int, step: int, token: int, logprobs: Array | None) -> bool:
        assert logprobs is not None
        told[request].append(logprobs)
        return True

    limits = {"max_tokens": args.kl_tokens, "logprobs": -1}
    dense, _ = driver.run(prompts, [PLAIN] * len(prompts), keep, **limits)

    def measure(group: Sequence[Cell]) -> None:
        copies = COPIES if group == [AGAIN] else 1
        asked = [(cell, index) for cell in group for _ in range(copies) for index in range(len(prompts))]
        found: list[list[float]] = [[] for _ in asked]
        parted = [False] * len(asked)

        def compare(request: int, step: int, token: int, logprobs: Array | None) -> bool:
            index = asked[request][1]
            same = token == dense[index][step]
            if step or group[0].kind == "pattern":
                assert logprobs is not None
                found[request].append(divergence(told[index][step], logprobs))
                parted[request] = not same
            return same

        began = time.perf_counter()
        _, steps = driver.run([prompts[index] for _, index in asked], [cell for cell, _ in asked], compare, **limits)
        common: Row = {"group_steps": dict(steps), "group_seconds": round(time.perf_counter() - began, 1)}
        if driver.density is not None:
            common["density"] = round(driver.density, 4)
        each = len(prompts) * copies
        parts = [slice(number * each, (number + 1) * each) for number in range(len(group))]
        add({**named(KL, c), **kl_summary(found[p], parted[p]), **common} for c, p in zip(group, parts, strict=True))

    for group in together(cells):
        measure(group)


def kl_summary(found: Sequence[Sequence[float]], parted: Sequence[bool]) -> Row:
    """Over all compared steps of all prompts.

    Args:
        found: divergences by prompt.
        parted: whether the last of these steps' token differs.

    Raises:
        ValueError: no step was compared.
    """
    values = np.array([value for own in found for value in own])
    if not len(values):
        raise ValueError("no step to compare: every answer ended or differed at its first token")
    return rounded({
        "prompts": len(found), "compared": len(values), "parted": sum(parted),
        "mean": float(values.mean()), "median": float(np.median(values)), "p90": float(np.quantile(values, 0.9)),
        "largest": float(values.max()), "same_choice": 1 - sum(parted) / len(values),
        "by_prompt": [statistics.fmean(own) if own else None for own in found],
    })  # fmt: skip


def agreement(driver: Driver, cells: Sequence[Cell], args: Namespace, add: Add) -> None:
    """One row for every cell; a request ends where it parts from dense."""
    length, tokenizer = args.output_tokens, driver.engine.tokenizer
    prompts = open_prompts(tokenizer, args.agreement_prompt, args.agreement_prompts * (1 + OTHERS), args.seed + 1)
    longest(prompts, length, driver.engine.max_model_len)
    own, others = prompts[: args.agreement_prompts], prompts[args.agreement_prompts :]
    limits = {"max_tokens": length, "ignore_eos": True}
    dense, _ = driver.run(own, [PLAIN] * len(own), go_on, **limits)

    def measure(group: Sequence[Cell], beside: Sequence[list[int]] = ()) -> None:
        asked = [(cell, index) for cell in group for index in range(len(own))]
        first = [length] * len(asked)
        left = set(range(len(asked)))

        def compare(request: int, step: int, token: int, logprobs: Array | None) -> bool:
            if request >= len(asked):
                return bool(left)
            if token != dense[asked[request][1]][step]:
                first[request] = step
            same = first[request] == length
            if not same or step + 1 == length:
                left.discard(request)
            return same

        began = time.perf_counter()
        batch = [own[index] for _, index in asked] + list(beside)
        each = [cell for cell, _ in asked] + [PLAIN] * len(beside)
        _, steps = driver.run(batch, each, compare, **limits)
        seconds = time.perf_counter() - began
        common = {"group_steps": dict(steps), "group_seconds": round(seconds, 1)}
        parts = [first[number * len(own) : (number + 1) * len(own)] for number in range(len(group))]
        add({**named(AGREEMENT, c), **spread(p, length), **common} for c, p in zip(group, parts, strict=True))

    for group in together(cells):
        measure(group, others if group == [BESIDE] else ())


def spread(first: Sequence[int], length: int) -> Row:
    """Of the numbers of tokens that agree; `length` where all do.

    Args:
        first: by prompt, the place of the first token that differs.
    """
    least, low, middle, high, most = (float(value) for value in np.quantile(first, [0, 0.25, 0.5, 0.75, 1]))
    return {
        "prompts": len(first), "output_tokens": length, "first": list(first), "min": least, "q1": low,
        "median": middle, "q3": high, "max": most, "never": sum(place == length for place in first) / len(first),
    }  # fmt: skip


SECTIONS = {NEEDLES: (needles, PLAIN), KL: (kl, AGAIN), AGREEMENT: (agreement, BESIDE)}
"""What measures a section's cells, and the dense one among them."""
