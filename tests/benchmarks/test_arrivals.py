from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu import arrivals as module
from benchmarks.gpu.arrivals import Record, arrivals, run, summary


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


class Engine:
    """Gives each request one token a step, a step a millisecond; the last of `slow` never ends."""

    def __init__(self, tokens: int, slow: str | None = None) -> None:
        self.tokens, self.slow = tokens, slow
        self.running: dict[str, int] = {}
        self.aborted: list[str] = []
        scheduler = SimpleNamespace(running=self.running)
        self.engine_core = SimpleNamespace(engine_core=SimpleNamespace(scheduler=scheduler))

    def add_request(self, name: str, prompt: Any, params: Any) -> None:
        self.running[name] = 0

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)

    def abort_request(self, names: list[str]) -> None:
        self.aborted = names
        for name in names:
            del self.running[name]

    def step(self) -> list[Any]:
        time.sleep(0.001)
        outputs = []
        for name in list(self.running):
            self.running[name] += 1
            finished = self.running[name] == self.tokens and name != self.slow
            part = SimpleNamespace(token_ids=[0] * self.running[name])
            outputs.append(SimpleNamespace(request_id=name, outputs=[part], finished=finished))
            if finished:
                del self.running[name]
        return outputs


def test_rows_come_while_a_rate_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 2)
    told: list[int] = []
    llm = SimpleNamespace(llm_engine=Engine(3))
    records, most = run(llm, 1000.0, 6, 2, 3, None, report=lambda done: told.append(len(done)))
    assert told == [2, 4] and 1 <= most <= 6
    assert all(record.done and record.tokens == 3 for record in records)


def test_a_rate_that_takes_too_long_ends_with_what_is_done() -> None:
    engine = Engine(3, slow="r1")
    records, _ = run(SimpleNamespace(llm_engine=engine), 1000.0, 4, 2, 3, None, seconds=0.3)
    assert [record.done for record in records] == [True, False, True, True]
    assert engine.aborted == ["r1"] and not engine.running
