"""Scores of all KV heads added, kernel against naive twin."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from attention_plugins.decode.rows import Mode
from tests.kernels.selector_batch import Batch, both

pytest.importorskip("triton")
SELECT, REUSE, DENSE = Mode.SELECT, Mode.REUSE, Mode.DENSE


@pytest.fixture(params=[1, 2, 5], ids=lambda heads: f"{heads} heads")
def batch(request: pytest.FixtureRequest, device: torch.device) -> Batch:
    return Batch(heads=request.param, dtype=torch.float16, device=device)


def test_add_heads(batch: Batch) -> None:
    """Rows that aren't compacted, every other one; the others' scores stay. Some sums aren't numbers."""
    thresholds = torch.tensor([float(not row.compacted and index % 4 != 2) for index, row in enumerate(batch.given)])
    rows, scores = replace(batch.rows, thresholds=thresholds.to(batch.device)), batch.scores()
    scores[:, 3] = math.inf
    scores[0, 5], scores[-1, 5] = math.inf, -math.inf
    (kernel,), (naive_one,) = both("add_heads", [scores], rows, batch.cache, SELECT | REUSE)
    torch.testing.assert_close(kernel, naive_one, rtol=1e-6, atol=1e-6)
    # Rows 0, 4 and 8 select, row 5 reuses, all heads alike; row 2 is compacted.
    changed = (naive_one != scores).any(0) if batch.heads > 1 else torch.zeros(0)
    for index, row in enumerate(batch.given if batch.heads > 1 else ()):
        own = changed[int(rows.starts[index]) : int(rows.starts[index]) + row.length]
        assert own.any() == bool(thresholds[index] and row.mode != DENSE and row.length), index
