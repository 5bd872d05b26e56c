"""A soak of one server: clients, canaries, and what its pool and its processes do meanwhile."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.serving import Server
from benchmarks.soak.clients import Clients, Found, wait_until
from benchmarks.soak.mix import Features, Mix, canaries
from benchmarks.soak.processes import parts, resident, slope, tree

EVERY = 1.0
"""Seconds between two samples."""
POOL, RUNNING, WAITING = "vllm:kv_cache_usage_perc", "vllm:num_requests_running", "vllm:num_requests_waiting"
PREEMPTIONS, AUDITS = "vllm:num_preemptions_total", "longreach_kv_audits_total"
COMPACTIONS, STEPS, PATTERNED = "longreach_kv_compactions", "longreach_decode_steps", "longreach_prefill_prompts"
GROWTH = 0.02, 24.0
"""Bound of a process' growth over the second half: so much of its memory, and so many MiB (allocators' noise)."""


@dataclass
class Series:
    """Samples: `seconds` since the beginning, `pool` in use (0 to 1), requests, MiB by process; `parts`: what these are
    at the beginning and at the end."""

    seconds: list[float] = field(default_factory=list)
    pool: list[float] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    memory: dict[str, list[float]] = field(default_factory=dict)
    parts: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def take_parts(self, processes: dict[str, int]) -> None:
        """What the processes' memory is at this moment."""
        for name, process in processes.items():
            self.parts.setdefault(name, []).append(parts(process))

    def sample(self, server: Server, began: float, processes: dict[str, int]) -> None:
        pool, running, waiting = (server.metric(name) for name in (POOL, RUNNING, WAITING))
        self.seconds.append(round(time.monotonic() - began, 1))
        self.pool.append(round(pool, 4))
        self.running.append(int(running))
        self.waiting.append(int(waiting))
        for name, process in processes.items():
            self.memory.setdefault(name, []).append(round(resident(process) or 0.0, 1))

    def memory_told(self) -> dict[str, dict[str, Any]]:
        """Of each process: MiB at the beginning, half-way and at the end; MiB an hour over the second half; whether it
        grew by no more than `GROWTH` allows; what it was at first and in the end."""
        told: dict[str, dict[str, Any]] = {}
        half = len(self.seconds) // 2
        for name, values in self.memory.items():
            times = self.seconds[half:]
            by_hour = slope(times, values[half:]) * 3600
            grown = by_hour * (times[-1] - times[0]) / 3600
            told[name] = {
                "first": values[0], "half": values[half], "last": values[-1],
                "mib_per_hour": round(by_hour, 1), "grown_mib": round(grown, 1),
                "bound_mib": round(GROWTH[0] * values[half] + GROWTH[1], 1),
                "flat": grown <= GROWTH[0] * values[half] + GROWTH[1], "parts_mib": self.parts.get(name, []),
            }  # fmt: skip
        return told

    def thinned(self, points: int = 240) -> dict[str, Any]:
        """As JSON, at most so many samples."""
        step = max(1, -(-len(self.seconds) // points))
        return {
            "seconds": self.seconds[::step], "pool": self.pool[::step], "running": self.running[::step],
            "waiting": self.waiting[::step],
            "memory_mib": {name: values[::step] for name, values in self.memory.items()},
        }  # fmt: skip


def features_of(server: Server, *, stock: bool = False, **known: Any) -> Features:
    """Ask a server what it takes.

    Args:
        stock: it is vLLM's own.
        known: fields of `Features` that can't be asked for.
    """
    models = json.loads(server.get("/v1/models"))["data"]
    base = next(model for model in models if not model.get("parent"))
    answer = known.pop("answer", None) or 120
    longest = min(known.pop("longest", None) or 1500, base["max_model_len"] - answer - 8)
    known |= {"longest": longest, "answer": answer, "priorities": _takes(server, base["id"], priority=1)}
    if stock:
        return Features(base["id"], patterns=False, prompt_logprobs=False, stock=True, **known)
    selectors = json.loads(server.get("/v1/decode/selectors"))
    policies = json.loads(server.get("/v1/kv/policies"))
    patterns = json.loads(server.get("/v1/prefill/patterns"))
    return Features(
        model=base["id"],
        adapters=tuple(model["id"] for model in models if model.get("parent")),
        selectors=tuple(one["name"] for one in selectors["data"] if one["enabled"]),
        policies=tuple(
            one["name"] for one in policies["data"] if policies["available"] and not one.get("unavailable_reason")
        ),
        patterns=patterns["available"],
        prompt_logprobs=_takes(server, base["id"], prompt_logprobs=1),
        **known,
    )


def _takes(server: Server, model: str, **fields: Any) -> bool:
    """Whether these fields are no 400."""
    body = {"model": model, "prompt": [100] * 20, "max_tokens": 1, **fields}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=300).status_code == 200


def soak(
    server: Server, features: Features, *, seconds: float, clients: int, seed: int, pause: float = 5.0,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Run, and tell what was found; `failures` is empty and `pool.leaked` 0 where all is well.

    Args:
        seconds: how long requests are begun.
        clients: that ask at the same time.
        pause: seconds between two canaries.
    """
    return asyncio.run(_soak(server, features, seconds, clients, seed, pause, progress))


async def _soak(
    server: Server, features: Features, seconds: float, number: int, seed: int, pause: float,
    progress: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    found, series, ended = Found(say=progress), Series(), False
    began = time.monotonic()
    end = float("inf")

    def running() -> bool:
        return not ended and time.monotonic() < end and server.process.poll() is None

    clients = Clients(server.url, found, running)
    processes = tree(server.process.pid)
    bodies = canaries(features)
    before = {name: await asyncio.to_thread(server.metric, name) for name in (PREEMPTIONS, AUDITS)}

    async def sample() -> None:
        number = 0
        while server.process.poll() is None and not ended:
            try:
                await asyncio.to_thread(series.sample, server, began, processes)
            except OSError as error:
                found.fail(f"/metrics: {error}")
                return
            if number % 60 == 0:
                state = f"{series.running[-1]} running, pool {series.pool[-1]:.0%}, {found.same_canaries()}"
                asked, failed = found.asked.total(), len(found.failures)
                progress(f"{series.seconds[-1]:.0f} s: {asked} requests, {state}, {failed} failures")
            number += 1
            await asyncio.sleep(EVERY)

    for name, body in bodies.items():  # alone: what they always have to answer
        await clients.canary(name, body)
    alone = time.monotonic() - began
    end = time.monotonic() + seconds
    await asyncio.to_thread(series.take_parts, processes)
    tasks = [clients.ask_on(Mix(features, seed * 1000 + index)) for index in range(number)]
    sampler = asyncio.create_task(sample())
    await asyncio.gather(*tasks, clients.watch_canaries(bodies, pause))
    await wait_until(time.monotonic() + 2, lambda: server.process.poll() is None)
    leaked = None
    if server.process.poll() is None:
        try:
            await asyncio.to_thread(server.wait_until_empty, 60)
            leaked = 0.0
        except (AssertionError, OSError) as error:
            leaked = 1.0
            found.fail(f"at the end: {error}")
        for name, body in bodies.items():  # alone again
            await clients.canary(name, body)
    else:
        found.fail(f"the server has ended: {server.process.poll()}")
    ended = True
    await sampler
    await asyncio.to_thread(series.take_parts, processes)
    await clients.http.aclose()
    return {
        "seconds": round(time.monotonic() - began, 1), "seconds_alone": round(alone, 1), "clients": number,
        "seed": seed, "asked": dict(found.asked), "with": dict(sorted(found.tags.items())),
        "answers": dict(found.answers), "answer_tokens": found.tokens, "kept_within_budget": found.kept,
        "server": await asyncio.to_thread(_told, server, before) if leaked is not None else {},
        "pool": {"leaked": leaked, "peak": max(series.pool, default=0.0), "most_running": max(series.running)},
        "memory": series.memory_told() if len(series.seconds) > 4 else {},
        "canaries": {name: {key: value for key, value in told.items() if key != "first"}
                     for name, told in found.canaries.items()},
        "failures": found.failures, "series": series.thinned(),
    }  # fmt: skip


def _told(server: Server, before: dict[str, float]) -> dict[str, Any]:
    """What `/metrics` says of the whole run."""
    told: dict[str, Any] = {
        "preemptions": int(server.metric(PREEMPTIONS) - before[PREEMPTIONS]),
        "audits": int(server.metric(AUDITS) - before[AUDITS]),
    }
    lines = server.get("/metrics").splitlines()
    for key, name, label in (("compactions", COMPACTIONS, "policy"), ("selected_steps", STEPS, "selector"),
                             ("patterned_prompts", PATTERNED, "pattern")):  # fmt: skip
        sums: dict[str, int] = {}
        for line in lines:
            if line.startswith(name + "_total{"):
                method = line.partition(f'{label}="')[2].partition('"')[0]
                sums[method] = sums.get(method, 0) + int(float(line.rpartition(" ")[2]))
        told[key] = sums
    return told
