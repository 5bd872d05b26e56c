"""Selectors in the engine: dense where they have to be, what the mathematics says where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.engine import selector_reference as by_hand
from tests.engine.harness import Engine, Job
from tests.engine.test_answers import prompt_of
from tests.reference import Reads, Reference

pytestmark = pytest.mark.engine

SELECTORS: list[dict[str, Any]] = [
    {"selector": "recycled", "stride": 4},
    {"selector": "recycled", "stride": 1000, "similarity": 0.9, "check_every": 2},
    {"selector": "tidal"},
    {"selector": "lessismore"},
    {"selector": "quest"},
    {"selector": "loki"},
    {"selector": "local", "share": 0.02},
]
each = pytest.mark.parametrize("selector", SELECTORS, ids=lambda words: "-".join(str(word) for word in words.values()))


def asking(selector: dict[str, Any], **words: Any) -> dict[str, Any]:
    return {"tokens": 96, "min_context": 0, **selector, **words}


@each
def test_reading_everything_is_dense_attention(engine: Engine, selector: dict[str, Any]) -> None:
    prompt = prompt_of(300)
    (dense,) = engine.run([Job(prompt, max_tokens=20)])
    (job,) = engine.run([Job(prompt, decode=asking(selector, tokens=320), max_tokens=20)])
    assert job.tokens == dense.tokens
    assert job.steps == {"dense": 19}


@each
def test_few_tokens_change_the_answer(engine: Engine, selector: dict[str, Any]) -> None:
    prompt = prompt_of(641)
    (dense,) = engine.run([Job(prompt, max_tokens=30)])
    (job,) = engine.run([Job(prompt, decode=asking(selector), max_tokens=30)])
    assert job.tokens != dense.tokens
    assert sum(job.steps.values()) == 29
    assert job.steps.get("dense", 0) == 0


REFERENCES: list[tuple[dict[str, Any], Callable[[], Reads]]] = [
    (SELECTORS[0], lambda: by_hand.Recycled(96, 4)),
    (SELECTORS[1], lambda: by_hand.Recycled(96, 1000, 0.9, 2)),
    (SELECTORS[2], lambda: by_hand.Tidal(96, [1])),
    (SELECTORS[3], lambda: by_hand.LessIsMore(96, [0, 1])),
    (SELECTORS[4], lambda: by_hand.Quest(96)),
    (SELECTORS[5], lambda: by_hand.Loki(96)),
    (SELECTORS[6], lambda: by_hand.Local(96, 0.02)),
]


@pytest.mark.parametrize("length", [640, 650])
@pytest.mark.parametrize(
    "selector, reads", REFERENCES, ids=lambda value: value["selector"] if isinstance(value, dict) else ""
)
def test_answers_are_what_the_formulas_say(
    engine: Engine, reference: Reference, selector: dict[str, Any], reads: Callable[[], Reads], length: int
) -> None:
    (job,) = engine.run([Job(prompt_of(length), decode=asking(selector), max_tokens=40)])
    assert job.tokens == reference.greedy_reading(job.prompt, 40, reads())


def test_a_stride_of_one_is_dense(engine: Engine) -> None:
    prompt = prompt_of(641)
    (dense,) = engine.run([Job(prompt, max_tokens=30)])
    (job,) = engine.run([Job(prompt, decode=asking({"selector": "recycled", "stride": 1}), max_tokens=30)])
    assert job.tokens == dense.tokens
    assert job.steps == {"select": 29}
