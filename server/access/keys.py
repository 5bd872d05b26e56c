"""API keys, hashed: one a line of a file.

    NAME sha256:HEX [for=AREA,...] [requests=N] [tokens=N] [concurrent=N] [cache=own]

A key is 256 random bits, so its SHA-256 says nothing about it, and nobody finds it by trying: slow hashes such as
bcrypt are for passwords, which people choose. They would cost each request tens of milliseconds here, for nothing.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.errors import StartError

PREFIX, RANDOM_BYTES = "lr-", 32
AREAS = {
    "api": "requests to the model: /v1, /tokenize and their like",
    "metrics": "/metrics",
    "console": "/console, the page",
    "admin": "everything else, such as adapters, profiles and scaling",
}
"""What a key may be for."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"sha256:([0-9a-f]{64})")
_SHAPE = "NAME sha256:64 HEX DIGITS [for=AREA,...] [requests=N] [tokens=N] [concurrent=N] [cache=own]"


@dataclass(frozen=True)
class Key:
    """One line of the file.

    Attributes:
        name: in logs and metrics; the key itself never is.
        digest: SHA-256 of the key.
        areas: what it opens, of `AREAS`.
        requests: most a minute; None for any number.
        tokens: most a minute, of prompts and answers.
        concurrent: most at a time.
        own_cache: whether its prompts share no prefix with those of other keys.
    """

    name: str
    digest: bytes
    areas: tuple[str, ...] = ("api",)
    requests: int | None = None
    tokens: int | None = None
    concurrent: int | None = None
    own_cache: bool = False

    def line(self) -> str:
        """As the file has it."""
        words = [self.name, f"sha256:{self.digest.hex()}"]
        if self.areas != ("api",):
            words.append(f"for={','.join(self.areas)}")
        for field in ("requests", "tokens", "concurrent"):
            if (value := getattr(self, field)) is not None:
                words.append(f"{field}={value}")
        return " ".join([*words, "cache=own"] if self.own_cache else words)


def new_key(name: str, **limits: object) -> tuple[str, Key]:
    """A key, to be shown once, and its entry.

    Raises:
        ValueError: a name or a limit that a file can't have.
    """
    key = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
    entry = Key(name, digest_of(key), **limits)  # type: ignore[arg-type]
    return key, parse_key(entry.line())


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def find_key(keys: Sequence[Key], presented: str) -> Key | None:
    """The key's entry, in a time that doesn't depend on which one it is."""
    digest, found = digest_of(presented), None
    for key in keys:
        if secrets.compare_digest(digest, key.digest):
            found = key
    return found


def parse_key(line: str) -> Key:
    """One entry.

    Raises:
        ValueError: what is wrong with it, and what is allowed; never with the hash.
    """
    name, *words = line.split()
    if not _NAME.fullmatch(name):
        raise ValueError("a name has 1 to 64 letters, digits, dots, dashes or underscores")
    if not words or not (found := _HASH.fullmatch(words[0])):
        raise ValueError(f"an entry is: {_SHAPE} (`longreach keys add` makes it)")
    key = Key(name, bytes.fromhex(found[1]))
    given: dict[str, object] = {}
    for word in words[1:]:
        field, _, value = word.partition("=")
        if field in given:
            raise ValueError(f"{field}= is there twice")
        given[field] = _value(field, value)
    areas = given.pop("for", key.areas)
    own = given.pop("cache", False)
    return Key(name, key.digest, areas=areas, own_cache=own, **given)  # type: ignore[arg-type]


def _value(field: str, text: str) -> object:
    if field == "for":
        areas = tuple(text.split(","))
        if unknown := [area for area in areas if area not in AREAS]:
            raise ValueError(f"for={unknown[0]}: allowed are {', '.join(AREAS)}")
        return areas
    if field == "cache":
        if text != "own":
            raise ValueError("cache= may be: own")
        return True
    if field not in ("requests", "tokens", "concurrent"):
        raise ValueError(f"{field}= isn't known; an entry is: {_SHAPE}")
    if not text.isdecimal() or not 1 <= int(text) <= 10**12:
        raise ValueError(f"{field}= takes a whole number above 0")
    return int(text)


def read_keys(file: Path) -> tuple[Key, ...]:
    """All entries; empty lines and those that begin with `#` are none.

    Raises:
        StartError: it can't be read, holds no key or a wrong one, or everybody may write it.
    """
    try:
        mode = file.stat().st_mode
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"--api-key-file {file}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if mode & stat.S_IWOTH:
        raise StartError(f"--api-key-file {file}: everybody may write it, so add keys to it: chmod o-w")
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            key = parse_key(line)
            if key.name in keys or any(key.digest == other.digest for other in keys.values()):
                raise ValueError(f"{key.name} or its key is there twice")
        except ValueError as error:
            raise StartError(f"--api-key-file {file}, line {number}: {error}") from None
        keys[key.name] = key
    if not keys:
        raise StartError(f"--api-key-file {file} holds no key: make one with `longreach keys add NAME --file {file}`")
    return tuple(keys.values())
