"""Start each server, load it with everything that isn't measured yet, keep what came of it."""

from __future__ import annotations

import asyncio
import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.evaluation.endpoint import Endpoint, Refused, TimedOut
from benchmarks.evaluation.variants import not_run
from benchmarks.loadtest.arrivals import starts
from benchmarks.loadtest.generator import Limits, Load
from benchmarks.loadtest.profiles import Profile
from benchmarks.loadtest.prompts import Piece, Turn
from benchmarks.loadtest.records import DONE
from benchmarks.loadtest.settings import Settings, SettingsError
from benchmarks.loadtest.store import Cell, Key, Store
from benchmarks.loadtest.systems import ServerSpec, System
from benchmarks.loadtest.watch import Watcher
from benchmarks.serving import running_command

START_LIMIT = 900.0
"""Seconds that a server may take to start, if there are as many left."""
LEAST = 5.0
"""Seconds that a load needs to be worth beginning, beside its arrivals."""
IDLE = 60.0
"""Seconds to wait, between two loads, for the server to be idle."""
TRIAL_TOKENS = 8


def fair_share(spare: float, loads: int, full: bool) -> float:
    """Seconds that a load may go on after its arrivals, of those that are left beside arrivals for `loads` loads.

    So one that is overloaded leaves something to the next. A full load has no arrivals, and how long it takes differs
    much: half of what is left.
    """
    return max(LEAST, spare / 2 if full and loads > 1 else spare / loads)


class Runner:
    """One run into a store. `not_begun` holds what there was no time for."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings, self.store = settings, store
        self.end = time.monotonic() + settings.seconds
        self.not_begun: list[Key] = []
        self.failed = 0

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self) -> None:
        """
        Raises:
            RuntimeError: a server doesn't start.
            SettingsError: a server refuses what is asked of it.
        """
        sizes = [(pool, spec) for pool in self.settings.pools for spec in self.settings.servers]
        for place, (pool, spec) in enumerate(sizes):
            if spec.words and self.settings.variants and not self.missing(spec, pool, True):
                continue  # all is measured: the server needn't start
            with self.endpoint(spec, pool) as (endpoint, told):
                keys = self.missing(spec, pool, "kv_cache" in endpoint.neutral_fields())
                asyncio.run(self._load(endpoint, keys, told, later=len(sizes) - place - 1))

    def missing(self, spec: ServerSpec, pool: int | None, knows_policies: bool) -> list[tuple[Key, System, Profile]]:
        """What isn't measured of one server."""
        return [
            (key, system, profile)
            for profile in self.settings.profiles
            for rate, requests in self.settings.rates
            for system in self.settings.systems(spec, knows_policies)
            if not self.store.has(key := Key(profile.title, system.name, rate, requests, pool))
        ]

    @contextmanager
    def endpoint(self, spec: ServerSpec, pool: int | None) -> Iterator[tuple[Endpoint, dict[str, Any]]]:
        """A server's endpoint; one that is started here ends with the block."""
        settings = self.settings
        if spec.url:
            endpoint = Endpoint(spec.url, settings.model, settings.api_key)
            yield endpoint, {"version": endpoint.version, "model": endpoint.model}
            return
        log = self.store.folder / f"server-{spec.name.replace('/', '-')}{f'-{pool}' if pool else ''}.log"
        command = spec.command(pool)
        print(f"{spec.name}: {shlex.join(command)}", file=sys.stderr)
        with running_command(log, command, limit=min(START_LIMIT, max(self.left, 1.0)), progress=True) as server:
            endpoint = Endpoint(server.url, settings.model, settings.api_key)
            yield endpoint, {"version": endpoint.version, "model": endpoint.model, "command": shlex.join(spec.words)}

    async def _load(
        self, endpoint: Endpoint, keys: list[tuple[Key, System, Profile]], told: dict[str, Any], later: int
    ) -> None:
        """Everything in `keys`, as far as there is time."""
        watcher = Watcher(endpoint.root, endpoint.headers)
        tried: dict[tuple[str, str], dict[str, Any]] = {}
        try:
            for place, (key, system, profile) in enumerate(keys):
                if (system.name, profile.title) not in tried and self.left > LEAST:
                    tried[system.name, profile.title] = await self._try(endpoint, system, profile)
                span = self.span(key, profile)
                if self.left < span + LEAST:
                    self.not_begun.append(key)
                    continue
                spans = [self.span(other, its) for other, _, its in keys[place:] if self.left > self.span(other, its)]
                share = fair_share(self.left - sum(spans), len(spans) + later * len(keys), math.isinf(key.rate))
                drain = min(self.settings.drain_of(profile, key.rate), share, self.left - span)
                cell = await self._measure(endpoint, watcher, key, system, profile, drain)
                cell.server, cell.usage = told, tried[system.name, profile.title]
                self.store.add(cell)
        finally:
            await watcher.close()
            await endpoint.close()

    def span(self, key: Key, profile: Profile) -> float:
        """Seconds from a load's begin to its last arrival."""
        count = len(profile.conversations(key.requests, self.settings.writer.seed))
        return 0.0 if math.isinf(key.rate) else count / key.rate

    async def _try(self, endpoint: Endpoint, system: System, profile: Profile) -> dict[str, Any]:
        """One request that isn't measured: the server warms up, and refuses now what it refuses.

        Raises:
            SettingsError: what the server says.
        """
        room = endpoint.max_model_len
        if room is not None and profile.longest > room:
            raise SettingsError(f"--profile {profile.title}: its requests take up to {profile.longest} tokens, "
                                f"{endpoint.model} has room for {room}")  # fmt: skip
        first = profile.conversations(1, self.settings.writer.seed)[0].turns[0]
        ids = self.settings.writer.ids(Turn((Piece("trial", first.tokens),), first.output))
        fields = {**system.fields, "ignore_eos": True, "cache_salt": "trial"}
        try:
            reply = await endpoint.complete(ids, min(TRIAL_TOKENS, first.output), fields, stream=False)
        except (Refused, TimedOut) as error:
            raise SettingsError(f"{system.name}: the server refuses it: {error}") from error
        if why := not_run(system.fields, reply.usage):
            raise SettingsError(f"{system.name}: {why}")
        if reply.usage.get("prompt_tokens") != len(ids):
            seen = reply.usage.get("prompt_tokens")
            raise SettingsError(f"{system.name}: {len(ids)} tokens were sent, the server says {seen}")
        return {name: value for name, value in reply.usage.items() if isinstance(value, dict)}

    async def _measure(
        self, endpoint: Endpoint, watcher: Watcher, key: Key, system: System, profile: Profile, drain: float
    ) -> Cell:
        await watcher.until_idle(IDLE)
        settings = self.settings
        conversations = profile.conversations(key.requests, settings.writer.seed)
        # Loads mustn't find the prompts of an earlier one in the prefix cache.
        fields = {**system.fields, "cache_salt": f"{key.file} {time.time()}"}
        limits = Limits(self.span(key, profile) + 1.0, drain, settings.concurrency)
        begins = starts(len(conversations), key.rate, settings.writer.seed)
        words = f"{system.name}, {key.rate:g}/s, {profile.name}"
        await watcher.start()
        load = Load(endpoint, settings.writer, conversations, begins, fields, limits, words)
        requests = await load.run()
        watched = await watcher.stop()
        done = sum(request.status == DONE for request in requests)
        good = sum(request.good(settings.goals) for request in requests)
        self.failed += sum(request.error is not None for request in requests)
        print(f"{words}: {done} of {len(requests)} done, {good} good, {load.duration:.0f} s", file=sys.stderr)
        return Cell(
            key, system.fields, system.compresses, {}, {}, round(load.duration, 3), load.metrics(settings.goals),
            watched.as_dict(), load.most_in_flight, requests,
        )  # fmt: skip
