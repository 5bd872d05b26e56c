"""What the evaluation's tests share: a prompter, a haystack and a fake endpoint."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.evaluation.haystack import Haystack
from benchmarks.evaluation.tokens import Prompter
from benchmarks.quality.passkeys import Tokenizer
from tests.benchmarks.evaluation.fake import Fake, serving


@pytest.fixture(scope="session")
def prompter(tokenizer: Tokenizer) -> Prompter:
    return Prompter(tokenizer)


@pytest.fixture(scope="session")
def haystack() -> Haystack:
    return Haystack()


@pytest.fixture
def fake(tokenizer: Tokenizer) -> Iterator[Fake]:
    with serving(Fake(tokenizer)) as served:
        yield served
