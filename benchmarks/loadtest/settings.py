"""What a run measures, from the command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.loadtest import profiles
from benchmarks.loadtest.profiles import Profile, ProfileError
from benchmarks.loadtest.prompts import HIGH, LOW, Writer
from benchmarks.loadtest.records import Goals
from benchmarks.loadtest.systems import (
    ServerSpec,
    System,
    SystemsError,
    parse_bytes,
    refuse_remote,
    server,
    systems,
    variant,
)

OWN = ["--server", "embedded=longreach serve --max-model-len 4096 --kv-cache-memory-bytes 155000000 --max-num-seqs 16"]
"""What is loaded where nobody names a server: the embedded model, with room for three prompts of 2,048 tokens."""
VARIANTS: list[tuple[str, str | None, dict[str, Any]]] = [
    ("none", None, {"kv_cache": {"policy": "none"}}),
    ("snapkv 512", None, {"kv_cache": {"policy": "snapkv", "budget": 512}}),
]
"""What is compared where nobody names a variant, on a Longreach server."""
LATE = 2.0
"""Seconds more, for answers on their way."""
MOST_REQUESTS, MOST_SECONDS, MOST_CONCURRENCY = 10_000, 6 * 3600, 4096


class SettingsError(ValueError):
    """The command line asks for something that can't be measured."""


@dataclass(frozen=True)
class Settings:
    """A run.

    Attributes:
        rates: each with its number of requests.
        servers: what is loaded; systems come from them and `variants` once it is known which are Longreach.
        pools: bytes of KV cache that every server is started with in turn, or one None.
        seconds: for everything together.
    """

    out: Path
    servers: list[ServerSpec]
    variants: list[tuple[str, str | None, dict[str, Any]]]
    profiles: list[Profile]
    rates: list[tuple[float, int]]
    pools: list[int | None]
    concurrency: int
    seconds: float
    drain: float | None
    goals: Goals
    writer: Writer
    model: str | None
    api_key: str
    baseline: str | None

    def systems(self, spec: ServerSpec, knows_policies: bool) -> list[System]:
        """Those of one server. Without any `--variant`, a Longreach server has `VARIANTS`, others none."""
        variants = self.variants or (VARIANTS if knows_policies else [])
        return [one for one in systems(self.servers, variants) if one.server == spec]

    def drain_of(self, profile: Profile, rate: float) -> float:
        """Seconds that a load may take after its last arrival. What isn't finished by then can't be good any more."""
        if self.drain is not None:
            return self.drain
        if math.isinf(rate):
            return self.seconds
        return self.goals.ttft + profile.output * self.goals.tpot + LATE

    def identity(self) -> dict[str, Any]:
        """What results in one folder must have in common to be compared."""
        return {
            "seed": self.writer.seed, "tokens": [self.writer.low, self.writer.high],
            "ttft_goal": self.goals.ttft, "tpot_goal": self.goals.tpot,
        }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `longreach loadtest run`."""
    add = parser.add_argument_group("what is loaded").add_argument
    add("--url", help="a server that runs, such as http://127.0.0.1:8000 (left out, with --server too: one with the "
        "embedded model is started)")  # fmt: skip
    add("--server", action="append", metavar="NAME=COMMAND|URL", help="a server to start, 'longreach serve ...', "
        "'vllm serve MODEL ...' or any that takes --host and --port; or one that runs; may be repeated")  # fmt: skip
    add("--variant", action="append", metavar="NAME[@SERVER]=JSON", help="fields of every request's body, such as "
        "'snapkv={\"kv_cache\": {\"policy\": \"snapkv\", \"budget\": 2048}}'; may be repeated. Left out: none and "
        "snapkv at 512 on a Longreach server, and nothing on others")  # fmt: skip
    add("--model", help="which of the served models (the first)")
    add("--api-key", default="none", help="of the server (none)")
    add("--remote", action="store_true", help="let --url and --server name another machine than this one")
    add = parser.add_argument_group("with what").add_argument
    add("--profile", action="append", metavar="NAME[,ARG=NUMBER...]", help="`longreach loadtest profiles` lists them "
        "(prompts,prompt=2048,output=128); may be repeated")  # fmt: skip
    add(
        "--rates",
        default="0.1,0.2,0.4",
        metavar="RATE[xREQUESTS],...",
        help="arrivals a second; inf: all at once (0.1,0.2,0.4)",
    )
    add("--requests", type=int, default=10, help="of each load whose rate names no number (10)")
    add("--pools", help="bytes of KV cache, by commas, such as 200M,400M: every server is started with each")
    add("--seed", type=int, default=0, help="of prompts and arrivals (0)")
    add("--token-ids", default=f"{LOW}:{HIGH}", metavar="LOW:HIGH", help="that prompts are made of (1000:30000)")
    add = parser.add_argument_group("limits and goals").add_argument
    add("--seconds", type=float, default=540, help="for everything together, servers' starts too (540)")
    add("--drain", type=float, help="seconds that a load may take after its last arrival (left out: as long as a "
        "request can still be good; with the rate inf, its share of what is left)")  # fmt: skip
    add("--concurrency", type=int, default=512, help="requests in flight at most (512)")
    add("--ttft", type=float, default=10.0, help="seconds to its first token that a good request keeps (10)")
    add("--tpot", type=float, help="seconds per token after it (0.05; 0.25 for the embedded model's own server)")
    add = parser.add_argument_group("results").add_argument
    add("--out", type=Path, default=Path("loadtest"), metavar="DIR", help="report.html, results.json (loadtest)")
    add("--baseline", metavar="SYSTEM", help="what others are compared with (the first that compresses nothing)")
    add("--note", help="goes into the report, such as the machine's name")


def settings(args: argparse.Namespace) -> Settings:
    """
    Raises:
        SettingsError, SystemsError, ProfileError: what to change.
    """
    own = not args.url and not args.server
    texts = OWN[1::2] if own else args.server or []
    servers = [server(text) for text in texts]
    if args.url:
        servers.insert(0, server(f"server={args.url}"))
    names = [spec.name for spec in servers]
    if len(set(names)) < len(names):
        raise SettingsError(f"two servers have one name: {', '.join(names)}")
    for spec in servers:
        if spec.url:
            refuse_remote(spec.url, args.remote)
    variants = [variant(text) for text in args.variant or []]
    if variants:
        systems(servers, variants)  # names that don't fit are told before anything starts
    pools: list[int | None] = [parse_bytes(text) for text in args.pools.split(",")] if args.pools else [None]
    if args.pools and any(spec.url for spec in servers):
        raise SettingsError("--pools starts every server with each size: give --server NAME=COMMAND, not a URL")
    drain = None if args.drain is None else _within("--drain", args.drain, 1, MOST_SECONDS)
    tpot = args.tpot or (0.25 if own else 0.05)
    return Settings(
        args.out, servers, variants, _profiles(args), _rates(args.rates, args.requests), pools,
        _within("--concurrency", args.concurrency, 1, MOST_CONCURRENCY),
        _within("--seconds", args.seconds, 10, MOST_SECONDS), drain,
        Goals(_within("--ttft", args.ttft, 0.001, 3600), _within("--tpot", tpot, 1e-4, 3600)),
        _writer(args), args.model, args.api_key, args.baseline,
    )  # fmt: skip


def _within(name: str, value: Any, least: float, most: float) -> Any:
    if not least <= value <= most:
        raise SettingsError(f"{name} {value:g}: allowed are {least:g} to {most:g}")
    return value


def _profiles(args: argparse.Namespace) -> list[Profile]:
    found = [profiles.parse(text) for text in args.profile or ["prompts,prompt=2048,output=128"]]
    if len({profile.title for profile in found}) < len(found):
        raise ProfileError("--profile: one is there twice")
    return found


def _rates(text: str, requests: int) -> list[tuple[float, int]]:
    _within("--requests", requests, 1, MOST_REQUESTS)
    found: dict[float, int] = {}
    for word in text.split(","):
        rate, _, number = word.partition("x")
        try:
            found[float(rate)] = _within(f"--rates {word}:", int(number or requests), 1, MOST_REQUESTS)
        except ValueError as error:
            told = error if isinstance(error, SettingsError) else f"--rates {text}: numbers by commas: 0.1,0.5x200,inf"
            raise SettingsError(told) from None
    if any(not rate > 0 for rate in found):
        raise SettingsError(f"--rates {text}: all must be above 0; inf sends everything at once")
    return sorted(found.items())


def _writer(args: argparse.Namespace) -> Writer:
    low, _, high = args.token_ids.partition(":")
    if not (low.isdigit() and high.isdigit() and int(low) < int(high)):
        raise SettingsError(f"--token-ids {args.token_ids}: two numbers such as {LOW}:{HIGH}, the second is larger")
    return Writer(args.seed, int(low), int(high))


def planned_seconds(sett: Settings, loads: int) -> float:
    """What `loads` loads of every rate and profile take at most, without servers' starts."""
    return loads * sum(
        (0.0 if math.isinf(rate) else requests / rate) + min(sett.drain_of(profile, rate), sett.seconds)
        for rate, requests in sett.rates
        for profile in sett.profiles
    )


__all__: Sequence[str] = ("ProfileError", "Settings", "SettingsError", "SystemsError", "add_arguments", "settings")
