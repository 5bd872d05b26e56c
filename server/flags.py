"""Flags that stand for the fields of a request's object: `--kv-window` for `kv_cache.window`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from attention_plugins.decode.registry import FIELD as DECODE_FIELD
from attention_plugins.prefill.registry import FIELD as PREFILL_FIELD
from kvcache.method import Arguments, PolicyError
from server.advice import advised
from server.errors import StartError


class Setting(argparse.Action):
    """A flag of ours. `names`: what it may be given, where that is a choice; checked later, beside requests'."""

    def __init__(self, *args: Any, names: Iterable[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.names = tuple(names)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values)


class Off(Setting):
    """A flag without a value that turns off what is on without it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, nargs=0, default=True, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, False)


class On(Setting):
    """A flag without a value that turns on what is off without it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, nargs=0, default=False, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, True)


def add_setting(group: Any, flag: str, text: str, action: type[Setting] = Setting, **more: Any) -> None:
    """Add a flag of ours to a parser's group, its help with what it costs.

    Args:
        more: further arguments of `add_argument`, and `names` of `Setting`.
    """
    group.add_argument(flag, action=action, help=advised(flag, text).replace("%", "%%"), **more)


@dataclasses.dataclass(frozen=True)
class Argument:
    """An argument that some methods take.

    Attributes:
        name: as a request has it.
        texts: what it means, each with the names of the methods for which it does.
        schemas: by method, its JSON schema.
    """

    name: str
    texts: dict[str, list[str]]
    schemas: dict[str, dict[str, Any]]

    @property
    def text(self) -> str:
        return " ".join(f"{text.removesuffix('.')} ({', '.join(who)})." for text, who in self.texts.items())

    @property
    def choices(self) -> list[str]:
        """What it may be, where that is a choice."""
        return list(dict.fromkeys(str(word) for schema in self.schemas.values() for word in schema.get("enum", ())))


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

    def add(self, group: Any, argument: str, text: str, metavar: str = "VALUE", names: Iterable[str] = ()) -> None:
        """Add one flag to a parser's group; without it, the argument isn't in the namespace."""
        dest, flag = self._dest + argument, self.flag(argument)
        add_setting(group, flag, text, dest=dest, default=argparse.SUPPRESS, metavar=metavar, names=names)

    def add_all(self, group: Any, takers: Iterable[tuple[str, type[Arguments]]]) -> None:
        """Add a flag for every argument of these methods, by name."""
        for argument in described(takers):
            self.add(group, argument.name, argument.text, names=argument.choices)

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


def described(takers: Iterable[tuple[str, type[Arguments]]]) -> list[Argument]:
    """Every argument of these methods once, in the order in which they come."""
    found: dict[str, Argument] = {}
    for method, arguments in takers:
        for name, schema in arguments.model_json_schema()["properties"].items():
            argument = found.setdefault(name, Argument(name, {}, {}))
            if method not in argument.schemas:  # a policy and its allocator may have one name
                argument.schemas[method] = schema
                argument.texts.setdefault(schema.get("description", ""), []).append(method)
    return list(found.values())


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
