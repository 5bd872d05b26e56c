"""Flags that stand for the fields of a request's object: `--kv-window` for `kv_cache.window`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

from attention_plugins.decode.registry import FIELD as DECODE_FIELD
from attention_plugins.prefill.registry import FIELD as PREFILL_FIELD
from kvcache.method import Arguments, PolicyError
from server.errors import StartError


@dataclasses.dataclass(frozen=True)
class FieldFlags:
    """The flags of one field.

    Attributes:
        field: the request's.
        prefix: of every flag.
        names: flags whose names aren't the prefix and the argument's name.
    """

    field: str
    prefix: str
    names: dict[str, str] = dataclasses.field(default_factory=dict)

    def flag(self, argument: str) -> str:
        return self.prefix + self.names.get(argument, argument).replace("_", "-")

    def flags(self, arguments: Iterable[str]) -> str:
        return ", ".join(self.flag(argument) for argument in arguments)

    @property
    def _dest(self) -> str:
        return self.prefix.strip("-").replace("-", "_") + "_arg_"

    def add(self, group: Any, argument: str, text: str, metavar: str = "VALUE") -> None:
        """Add one flag to a parser's group; without it, the argument isn't in the namespace."""
        group.add_argument(
            self.flag(argument),
            dest=self._dest + argument,
            default=argparse.SUPPRESS,
            metavar=metavar,
            help=text.replace("%", "%%"),
        )

    def add_all(self, group: Any, takers: Iterable[tuple[str, type[Arguments]]]) -> None:
        """Add a flag for every argument of these methods, by name."""
        for argument, text, who in described(takers):
            self.add(group, argument, f"{text} ({', '.join(who)})")

    def given(self, args: argparse.Namespace) -> dict[str, Any]:
        """The arguments that the command line gives, as a request would."""
        found = vars(args).items()
        return {key.removeprefix(self._dest): _value(value) for key, value in found if key.startswith(self._dest)}

    def refuse_foreign(self, given: Iterable[str], known: list[str], method: str) -> None:
        """Refuse arguments of other methods, in the words of the command line.

        Raises:
            StartError: says what this one takes.
        """
        if foreign := [name for name in given if name not in known]:
            raise StartError(f"{self.flags(foreign)}: {method} takes {self.flags(known)}.")


KV = FieldFlags("kv_cache", "--kv-")
DECODE = FieldFlags(DECODE_FIELD, "--decode-", {"selector": "attention", DECODE_FIELD: "attention"})
PREFILL = FieldFlags(PREFILL_FIELD, "--prefill-", {"pattern": "attention", PREFILL_FIELD: "attention"})


def in_flags(error: PolicyError) -> str:
    """A request's error in the words of the command line."""
    for family in (KV, DECODE, PREFILL):
        if error.field.partition(".")[0] == family.field:
            argument = error.field.removeprefix(f"{family.field}.")
            return f"{family.flag(argument)}: {error.problem} Allowed: {error.allowed}."
    return str(error)


def described(takers: Iterable[tuple[str, type[Arguments]]]) -> Iterator[tuple[str, str, list[str]]]:
    """Every argument of these methods once, with its description and the names of those that take it."""
    found: dict[str, tuple[str, list[str]]] = {}
    for name, arguments in takers:
        for argument, schema in arguments.model_json_schema()["properties"].items():
            who = found.setdefault(argument, (schema.get("description", ""), []))[1]
            if name not in who:
                who.append(name)
    return ((argument, text, who) for argument, (text, who) in found.items())


def tell_workers(args: argparse.Namespace, **entries: Any) -> None:
    """Put something where workers and the scheduler look (`additional_config`), in place, beside what is there."""
    known = args.additional_config or {}
    args.additional_config = {**known, "longreach": {**known.get("longreach", {}), **entries}}


def _value(text: str) -> Any:
    """A flag's text as a request would say it: 512 is a number, 25% and avg are strings."""
    try:
        return json.loads(text)
    except ValueError:
        return text
