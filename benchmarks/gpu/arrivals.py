"""Requests that arrive at a rate: throughput, time to first token, time per output token, goodput.

python -m benchmarks.gpu.arrivals stock|longreach [--fp8] [--rates 0.4,0.8,1.2x300] [--requests 200]
    [--until SECONDS] [--capacity SHAPE [--same]]

While a rate runs, a row of what is finished comes after every 25 requests (`so_far`), so that a run that is broken off
leaves something. --until ends it in good order, counted from this script's start: no rate begins after that, and what
runs is counted as it is, its other requests as `unfinished`.

A request is good when its first token came within 10 s and its others within 50 ms each, on average. Stock vLLM and
Longreach get the same arrivals. 8B shapes, random weights, prompts of 32k, answers of 1k. With --capacity the engine is
first filled as `benchmarks.gpu.capacity` does it, which saves a start.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gpu import capacity
from benchmarks.gpu.engine import build_8b, random_prompt, say

TTFT_LIMIT, TPOT_LIMIT = 10.0, 0.050
EVERY = 25
"""Finished requests between two rows of what there is so far."""
LEAST = 60.0
"""Seconds that a rate needs to be worth beginning."""


@dataclass
class Record:
    """Seconds since the run's start; `first` and `last` are of output tokens. `done`: all of them have come."""

    arrival: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    done: bool = False

    @property
    def ttft(self) -> float:
        return self.first - self.arrival

    @property
    def tpot(self) -> float:
        return (self.last - self.first) / max(1, self.tokens - 1)


def arrivals(rate: float, requests: int) -> list[float]:
    """Poisson arrivals, the same for every system."""
    choose = random.Random(1)
    times, now = [], 0.0
    for _ in range(requests):
        now += choose.expovariate(rate)
        times.append(now)
    return times


def run(
    llm: Any,
    rate: float,
    requests: int,
    prompt: int,
    output: int,
    words: dict[str, Any] | None,
    seconds: float = math.inf,
    report: Callable[[list[Record]], None] = lambda done: None,
) -> tuple[list[Record], int]:
    """What became of each request that has arrived, and how many ran at once at most.

    Args:
        seconds: after which the rest is aborted.
        report: called with the finished ones now and then.
    """
    from vllm import SamplingParams

    engine, most = llm.llm_engine, 0
    scheduler = engine.engine_core.engine_core.scheduler
    extra = {"kv_cache": words} if words else None
    params = SamplingParams(max_tokens=output, temperature=0, ignore_eos=True, detokenize=False, extra_args=extra)
    seed = int(rate * 1e6)
    prompts = [random_prompt(prompt, seed + i) for i in range(requests)]
    waiting = list(enumerate(arrivals(rate, requests)))
    records: dict[str, Record] = {}
    began = time.perf_counter()
    while waiting or engine.has_unfinished_requests():
        now = time.perf_counter() - began
        if now > seconds:
            engine.abort_request([name for name, record in records.items() if not record.done])
            break
        while waiting and waiting[0][1] <= now:
            i, arrival = waiting.pop(0)
            records[f"r{i}"] = Record(arrival)
            engine.add_request(f"r{i}", {"prompt_token_ids": prompts[i]}, params)
        if not engine.has_unfinished_requests():
            time.sleep(min(0.01, waiting[0][1] - now))
            continue
        outputs = engine.step()
        now = time.perf_counter() - began
        most = max(most, len(scheduler.running))
        for one in outputs:
            record, tokens = records[one.request_id], len(one.outputs[0].token_ids)
            if tokens:
                record.first = record.first or now
                record.last, record.tokens = now, tokens
            if one.finished:
                record.done = True
                done = [record for record in records.values() if record.done]
                if len(done) % EVERY == 0 and len(done) < requests:
                    report(done)
    while engine.has_unfinished_requests():
        engine.step()
    return list(records.values()), most


def summary(records: list[Record]) -> dict[str, Any]:
    ttft, tpot = (np.array([getattr(record, name) for record in records]) for name in ("ttft", "tpot"))
    span = max(record.last for record in records) - min(record.arrival for record in records)
    good = int(((ttft <= TTFT_LIMIT) & (tpot <= TPOT_LIMIT)).sum())
    return {
        "requests": len(records),
        "seconds": round(span, 1),
        "output_tokens_s": round(sum(record.tokens for record in records) / span, 1),
        "requests_s": round(len(records) / span, 3),
        "good": good,
        "goodput_s": round(good / span, 3),
        "ttft_s": {p: round(float(np.percentile(ttft, p)), 3) for p in (50, 90, 99)},
        "tpot_ms": {p: round(float(np.percentile(tpot, p)) * 1e3, 2) for p in (50, 90, 99)},
    }


def tell_so_far(rate: float, done: list[Record]) -> None:
    say(so_far=True, rate=rate, **summary(done))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=("stock", "longreach"))
    parser.add_argument("--fp8", action="store_true", help="an fp8 KV cache")
    parser.add_argument("--rates", default="0.4,0.8,1.2", help="requests a second, by commas; RATExREQUESTS")
    parser.add_argument("--requests", type=int, default=200, help="of rates that name no number")
    parser.add_argument("--prompt", type=int, default=32768)
    parser.add_argument("--output", type=int, default=1024)
    parser.add_argument("--until", type=float, default=math.inf, metavar="SECONDS", help="end the last rate then")
    parser.add_argument("--capacity", type=capacity.parse_shape, metavar="SHAPE", help="PROMPT or PROMPTxREQUESTS")
    parser.add_argument("--same", action="store_true", help="all requests of --capacity have one prompt")
    args, began = parser.parse_args(), time.perf_counter()
    stock = args.system == "stock"
    llm = build_8b(stock=stock, fp8=args.fp8)
    say(system=args.system, fp8=args.fp8, prompt=args.prompt, output=args.output)
    words = None if stock else {"policy": "snapkv", "budget": capacity.BUDGET}
    if args.capacity:
        prompt, requests = args.capacity
        capacity.measure(llm, prompt, requests, words, args.same)
    for text in args.rates.split(","):
        left = began + args.until - time.perf_counter()
        if left < LEAST:
            say(not_begun=text)
            continue
        rate, _, number = text.partition("x")
        requests = int(number or args.requests)
        found, most = run(
            llm, float(rate), requests, args.prompt, args.output, words, left,
            partial(tell_so_far, float(rate)),
        )  # fmt: skip
        if done := [record for record in found if record.done]:
            say(rate=float(rate), **summary(done), unfinished=requests - len(done), most_at_once=most)


if __name__ == "__main__":
    main()
