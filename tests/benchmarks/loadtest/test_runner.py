"""How a run shares its time between loads."""

from __future__ import annotations

from benchmarks.loadtest.runner import LEAST, fair_share


def test_what_is_left_is_shared_and_full_loads_take_half() -> None:
    assert fair_share(100, 4, full=False) == 25
    assert fair_share(100, 4, full=True) == 50
    assert fair_share(100, 1, full=True) == fair_share(100, 1, full=False) == 100
    assert fair_share(-20, 4, full=False) == fair_share(1, 2, full=True) == LEAST
