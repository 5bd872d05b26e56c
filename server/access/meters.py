"""How much a key has used: buckets that fill by the minute, and what is under way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from server.access.keys import Key


class Bucket:
    """Holds what may be used at once, a minute's worth; what is used comes back evenly over a minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self.per_minute, self.clock = per_minute, clock
        self._level, self._then = float(per_minute), clock()

    def level(self) -> float:
        now = self.clock()
        self._level = min(self.per_minute, self._level + (now - self._then) * self.per_minute / 60)
        self._then = now
        return self._level

    def take(self, amount: float) -> None:
        """Also more than there is: what is known only afterwards is a debt."""
        self._level = self.level() - amount

    def wait_for(self, amount: float) -> float:
        """Seconds until the bucket holds so much; 0 if it does."""
        return max(0.0, (amount - self.level()) * 60 / self.per_minute)


@dataclass(frozen=True)
class Excess:
    """A limit that is reached: its words for the client, and seconds after which to try again."""

    message: str
    retry_after: int


class Meter:
    """One key's. Tokens are known when a prompt has been read and an answer been given, so a request is let in while
    the last minute's aren't used up, and may overdraw them; then others wait until that is made up for."""

    def __init__(self, key: Key, clock: Callable[[], float] = time.monotonic) -> None:
        self.running = 0
        self.clock = clock
        self.limit(key)

    def limit(self, key: Key) -> None:
        """Take the limits of an entry, with full buckets; what is under way stays so."""
        self.key = key
        self.requests = Bucket(key.requests, self.clock) if key.requests else None
        self.tokens = Bucket(key.tokens, self.clock) if key.tokens else None

    def enter(self) -> Excess | None:
        """Let one request in, or say why not. Whoever is in has to `leave`."""
        if self.key.concurrent and self.running >= self.key.concurrent:
            return Excess(f"{self.key.concurrent} requests at a time", 1)
        if self.requests and (wait := self.requests.wait_for(1)):
            return Excess(f"{self.key.requests} requests a minute", math.ceil(wait))
        if self.tokens and (wait := self.tokens.wait_for(1)):
            return Excess(f"{self.key.tokens} tokens a minute", math.ceil(wait))
        if self.requests:
            self.requests.take(1)
        self.running += 1
        return None

    def leave(self) -> None:
        self.running -= 1

    def charge(self, tokens: int) -> None:
        if self.tokens:
            self.tokens.take(tokens)


class Meters:
    """Of all keys, by name."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._meters: dict[str, Meter] = {}

    def of(self, key: Key) -> Meter:
        meter = self._meters.get(key.name)
        if meter is None:
            meter = self._meters[key.name] = Meter(key, self.clock)
        elif meter.key != key:
            meter.limit(key)
        return meter
