"""What the load test's tests share: a fake endpoint, and a load on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.benchmarks.loadtest.fake import Fake, serving


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serving(Fake()) as served:
        yield served
