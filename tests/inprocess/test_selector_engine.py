"""What the quality of selectors is measured with: every step's token and whole distribution, and requests that stop."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality.selector_engine import PLAIN, Array, Driver, make_cells
from benchmarks.quality.selector_sections import divergence
from server.inprocess import InProcessEngine, build_engine
from tests.tiny_model import VOCABULARY

pytestmark = pytest.mark.engine

PROMPT = [random.Random(7).randrange(VOCABULARY) for _ in range(640)]
(FEW, MANY) = make_cells(["recycled,stride=4"], [], [64, 1024])


@pytest.fixture(scope="module")
def small(tiny_model: Path) -> InProcessEngine:
    flags = ["--dtype", "float32", "--skip-tokenizer-init", "--max-model-len", "2048", "--kv-cache-memory-bytes", "64M"]
    decode = {"selectors": ["recycled"], "states": 2}
    return build_engine([str(tiny_model), *flags], max_logprobs=-1, additional_config={"longreach": {"decode": decode}})


def test_every_step_is_seen_until_a_request_is_stopped(small: InProcessEngine) -> None:
    seen: list[list[tuple[int, Array]]] = [[], [], [], []]

    def see(request: int, step: int, token: int, logprobs: Array | None) -> bool:
        assert logprobs is not None and step == len(seen[request])
        seen[request].append((token, logprobs))
        return not (request == 3 and step == 4)

    cells = [PLAIN, MANY, FEW, PLAIN]
    answers, steps = Driver(small, 2).run([PROMPT] * 4, cells, see, max_tokens=20, ignore_eos=True, logprobs=-1)
    assert [len(answer) for answer in answers] == [20, 20, 20, 5]
    assert [[token for token, _ in own] for own in seen] == answers
    # The prompt's last queries choose what the first stride reads.
    assert steps == {"dense": 19, "select": 4, "reuse": 15}
    for token, logprobs in seen[0]:
        assert logprobs.shape == (VOCABULARY,) and int(logprobs.argmax()) == token
        assert np.exp(logprobs.astype(np.float64)).sum() == pytest.approx(1, abs=1e-4)
    assert answers[1] == answers[0] and answers[3] == answers[0][:5]
    whole, few = (divergence(seen[0][2][1], seen[request][2][1]) for request in (1, 2))
    assert whole < 1e-6 and few > 1e-4, (whole, few)


def test_steps_that_are_dense_for_want_of_room_are_an_error(small: InProcessEngine) -> None:
    with pytest.raises(ValueError, match="for want of room"):
        Driver(small, 3).run([PROMPT] * 3, [FEW] * 3, lambda *_: True, max_tokens=8, ignore_eos=True)
