"""What is compared: servers, and fields that requests carry to them."""

from __future__ import annotations

import ipaddress
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.evaluation.variants import NAMES

POOL_FLAG = "--kv-cache-memory-bytes"
UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


class SystemsError(ValueError):
    """A server or variant can't be used as it is written."""


@dataclass(frozen=True)
class ServerSpec:
    """A server: one that runs already (`url`) or words of a command that starts it."""

    name: str
    url: str | None = None
    words: tuple[str, ...] = ()

    def command(self, pool: int | None) -> list[str]:
        """What to run, without host and port. `pool`: bytes of its KV cache."""
        size = [POOL_FLAG, str(pool)] if pool is not None else []
        return [*runnable(self.words), *size]


@dataclass(frozen=True)
class System:
    """One line in every plot: a server and the fields of its requests."""

    name: str
    server: ServerSpec
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def compresses(self) -> bool:
        return any(
            isinstance(words := self.fields.get(key), dict) and words.get(word) not in (None, "none", "dense")
            for key, word in NAMES.items()
        )


def runnable(words: Sequence[str]) -> list[str]:
    """The command with the interpreter that runs this, where its console script isn't installed beside it."""
    first = words[0]
    if Path(first).name != first or first not in ("longreach", "vllm", "python"):
        return list(words)
    script = Path(sys.executable).parent / first
    if first == "python":
        return [sys.executable, *words[1:]]
    if first == "longreach":
        return [str(script), *words[1:]] if script.exists() else [sys.executable, "-m", "server.cli", *words[1:]]
    try:
        distribution("vllm")
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", *words[1:]]
    except PackageNotFoundError:
        # The CPU build has another name, which vLLM's own command line doesn't know.
        if len(words) < 3 or words[1] != "serve" or words[2].startswith("-"):
            raise SystemsError(f"{shlex.join(words)}: only `vllm serve MODEL ...` is known") from None
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", *words[2:]]


def server(text: str) -> ServerSpec:
    """`NAME=URL` or `NAME=COMMAND`.

    Raises:
        SystemsError: see there.
    """
    name, equals, rest = text.partition("=")
    if not equals or not name.strip() or not rest.strip():
        raise SystemsError(f"--server {text!r} isn't NAME=COMMAND or NAME=URL")
    if rest.startswith(("http://", "https://")):
        return ServerSpec(name, url=rest)
    words = tuple(shlex.split(rest))
    for flag in ("--host", "--port"):
        if any(word == flag or word.startswith(f"{flag}=") for word in words):
            raise SystemsError(f"--server {name}: leave {flag} out; it is started on a free port of 127.0.0.1")
    return ServerSpec(name, words=words)


def variant(text: str) -> tuple[str, str | None, dict[str, Any]]:
    """`NAME={...}` or `NAME@SERVER={...}`: name, server or None for all, fields.

    Raises:
        SystemsError: see there.
    """
    head, equals, body = text.partition("=")
    name, _, at = head.partition("@")
    try:
        fields = json.loads(body)
    except ValueError as error:
        raise SystemsError(f"--variant {name}: {body!r} isn't JSON: {error}") from error
    if not equals or not name or not isinstance(fields, dict):
        raise SystemsError(f"--variant {text!r} isn't NAME={{...}}, an object with fields of the request's body")
    taken = sorted({"prompt", "max_tokens", "stream", "model", "cache_salt"} & set(fields))
    if taken:
        raise SystemsError(f"--variant {name}: {', '.join(taken)} is for the load test itself to say")
    return name, at or None, fields


def systems(servers: Sequence[ServerSpec], variants: Sequence[tuple[str, str | None, dict[str, Any]]]) -> list[System]:
    """All that are compared, in order: each server as it is, if no variant is for it, or with each of its variants.

    Raises:
        SystemsError: names that nobody has, or that two have.
    """
    names = [spec.name for spec in servers]
    for name, at, _ in variants:
        if at is not None and at not in names:
            raise SystemsError(f"--variant {name}@{at}: there is no --server {at}, there are {', '.join(names)}")
    found = []
    for spec in servers:
        own = [entry for entry in variants if entry[1] in (None, spec.name)]
        several = len(servers) > 1
        found += [
            System(name if at or not several else f"{spec.name} {name}", spec, fields) for name, at, fields in own
        ] or [System(spec.name, spec)]
    twice = sorted({one.name for one in found if sum(other.name == one.name for other in found) > 1})
    if twice:
        raise SystemsError(f"two systems have the name {twice[0]}: give --server and --variant other names")
    return found


def refuse_remote(url: str, allowed: bool) -> None:
    """
    Raises:
        SystemsError: the host isn't this machine, and nobody said that it may be another.
    """
    host = urlsplit(url).hostname or ""
    try:
        here = ipaddress.ip_address(host).is_loopback
    except ValueError:
        here = host == "localhost"
    if not here and not allowed:
        raise SystemsError(f"{host or url} isn't this machine: a load test may stop it from serving anybody else. "
                           "Add --remote if it is yours and that is what you want.")  # fmt: skip


def parse_bytes(text: str) -> int:
    """`500M`, `2Gi` or a number.

    Raises:
        SystemsError: see there.
    """
    number = text.rstrip("KMGiB")
    unit = text[len(number) :].removesuffix("B")
    try:
        return int(float(number) * (UNITS[unit] if unit else 1))
    except (ValueError, KeyError):
        raise SystemsError(f"--pools {text!r} isn't a number of bytes such as 500M or 2Gi") from None
