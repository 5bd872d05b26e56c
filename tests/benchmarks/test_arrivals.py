from __future__ import annotations

import pytest

from benchmarks.gpu.arrivals import Record, arrivals, summary


def test_arrivals_are_the_same_for_all_and_have_the_rate() -> None:
    times = arrivals(2.0, 4000)
    assert times == arrivals(2.0, 4000) == sorted(times)
    assert 4000 / times[-1] == pytest.approx(2.0, rel=0.05)


def test_a_faster_rate_has_the_same_pattern() -> None:
    assert arrivals(4.0, 50) == pytest.approx([time / 2 for time in arrivals(2.0, 50)])


@pytest.mark.parametrize(
    ("first", "last", "good"),
    [
        (10.0, 15.0, True),  # first token after 10 s, then 100 steps of 50 ms
        (10.1, 15.1, False),
        (10.0, 15.1, False),
    ],
)
def test_good_requests_hold_both_limits(first: float, last: float, good: bool) -> None:
    assert summary([Record(0.0, first, last, 101)])["good"] == good


def test_summary() -> None:
    records = [Record(2.0 + i, 2.0 + i + 0.1 * (i + 1), 2.0 + i + 0.1 * (i + 1) + 1.0, 51) for i in range(10)]
    records.append(Record(3.0, 23.0, 24.0, 51))
    found = summary(records)
    assert found["requests"] == 11 and found["good"] == 10
    assert found["seconds"] == 22.0  # from the first arrival to the last token
    assert found["output_tokens_s"] == round(11 * 51 / 22, 1)
    assert found["requests_s"] == 0.5 and found["goodput_s"] == round(10 / 22, 3)
    assert found["ttft_s"] == {50: 0.6, 90: 1.0, 99: 18.1}
    assert found["tpot_ms"] == {50: 20.0, 90: 20.0, 99: 20.0}


def test_a_single_token_takes_no_time_of_others() -> None:
    assert Record(0.0, 1.0, 1.0, 1).tpot == 0.0
