"""When conversations begin: random (Poisson) arrivals, the same for all that are compared."""

from __future__ import annotations

import math
import random


def starts(count: int, rate: float, seed: int) -> list[float]:
    """Seconds at which each of `count` conversations begins.

    One row of random gaps is stretched to the rate, the last one begins at `count / rate`: so rates differ in nothing
    else, and a rate is kept exactly. An infinite rate: all at once.
    """
    if math.isinf(rate):
        return [0.0] * count
    choose = random.Random(f"arrivals {seed}")
    gaps = [choose.expovariate(1.0) for _ in range(count)]
    times, now = [], 0.0
    for gap in gaps:
        now += gap
        times.append(now)
    return [time * count / rate / now for time in times]
