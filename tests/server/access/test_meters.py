"""Limits by the minute and at a time, with a clock of our own."""

from __future__ import annotations

from typing import Any

from server.access.keys import Key
from server.access.meters import Meter, Meters


class World:
    def __init__(self, **limits: Any) -> None:
        self.now = 100.0
        self.meter = Meter(Key("a", b"", **limits), lambda: self.now)

    def enter(self) -> tuple[str, int] | None:
        excess = self.meter.enter()
        return (excess.message, excess.retry_after) if excess else None


def test_without_limits_everything_comes_in() -> None:
    world = World()
    assert [world.enter() for _ in range(1000)] == [None] * 1000


def test_requests_come_back_evenly_over_a_minute() -> None:
    world = World(requests=6)
    assert [world.enter() for _ in range(6)] == [None] * 6
    assert world.enter() == ("6 requests a minute", 10)
    world.now += 9.5
    assert world.enter() == ("6 requests a minute", 1)
    world.now += 0.5
    assert world.enter() is None and world.enter() is not None
    world.now += 3600
    assert [world.enter() for _ in range(7)].count(None) == 6


def test_tokens_may_be_overdrawn_and_are_waited_for() -> None:
    world = World(tokens=600)
    assert world.enter() is None
    world.meter.charge(900)
    assert world.enter() == ("600 tokens a minute", 31)  # 301 at ten a second
    world.now += 31
    assert world.enter() is None


def test_requests_at_a_time() -> None:
    world = World(concurrent=2, requests=3)
    assert (world.enter(), world.enter(), world.enter()) == (None, None, ("2 requests at a time", 1))
    world.meter.leave()
    assert world.enter() is None  # what was refused didn't count as a request


def test_new_limits_of_a_key_leave_what_is_under_way() -> None:
    meters = Meters(lambda: 0.0)
    old, new = Key("a", b"", concurrent=2), Key("a", b"", concurrent=1)
    meter = meters.of(old)
    assert meter.enter() is None and meters.of(old) is meter
    assert meters.of(new).enter() is not None
    meter.leave()
    assert meters.of(new).enter() is None
    assert meters.of(Key("b", b"")).running == 0
