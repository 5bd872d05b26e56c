"""Methods by name: those that there are, and the one that a request's words ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from pydantic import ValidationError

from kvcache.method import Method, PolicyError, explain

M = TypeVar("M", bound=Method)


def with_packages(base: type[M], built_in: Iterable[type[M]], group: str, none: str) -> dict[str, type[M]]:
    """Methods by name: ours, then those of installed packages.

    Args:
        base: what all of them are.
        group: of the packages' entry points.
        none: name that stands for no method.

    Raises:
        ValueError: when a package's entry point is no such method or takes a name that is in use.
    """
    found = {method.name: method for method in built_in}
    kind = base.__name__
    for entry in entry_points(group=group):
        method = entry.load()
        if not (isinstance(method, type) and issubclass(method, base)):
            raise ValueError(f"entry point {entry.name} of {group} is not a {kind}: {method!r}")
        if method.name == none or found.get(method.name, method) is not method:
            raise ValueError(f"entry point {entry.name}: the {kind.lower()} name {method.name!r} is taken")
        found[method.name] = method
    return found


def choose(words: Any, field: str, key: str, none: str, known: Mapping[str, type[M]]) -> tuple[type[M], Any] | None:
    """The method that a request asks for, and its arguments.

    Args:
        words: `{key: name, **arguments}`.
        field: where they stand, for error messages.
        none: name that stands for no method.

    Returns:
        None for that name.

    Raises:
        PolicyError: an unknown name or argument, or a bad value; says which and what is allowed.
    """
    if not isinstance(words, dict):
        raise PolicyError(field, f"must be an object, got {words!r}.", f'{{"{key}": NAME, ...}}')
    name = words.get(key)
    if name == none:
        if extra := sorted(set(words) - {key}):
            raise PolicyError(f"{field}.{extra[0]}", f"the {key} {none!r} takes no arguments.", "no further fields")
        return None
    if not isinstance(name, str) or name not in known:
        problem = "is missing." if key not in words else f"unknown {key} {name!r}."
        raise PolicyError(f"{field}.{key}", problem, ", ".join([none, *known]))
    method = known[name]
    try:
        return method, method.Args.model_validate({name: value for name, value in words.items() if name != key})
    except ValidationError as error:
        raise explain(field, name, method.Args, list(method.Args.model_fields), error) from None
