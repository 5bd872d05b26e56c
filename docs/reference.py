"""What docs/settings.md and docs/commands.md say: flags, request fields, routes and metrics, as rows of tables."""

from __future__ import annotations

import argparse
import inspect
from collections import defaultdict
from typing import Any

from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry

from attention_plugins.decode.registry import BUILT_IN as SELECTORS
from attention_plugins.prefill.registry import BUILT_IN as PATTERNS
from kvcache.method import Arguments
from kvcache.registry import BUILT_IN as POLICIES
from kvcache.registry import PARTS
from server import metrics
from server.advice import ADVICE
from server.arguments import make_parser
from server.commands import COMMANDS, EXIT_CODES, Command
from server.commands.parsers import examples_of
from server.commands.reference import own_groups, parsers_of
from server.flags import DECODE, KV, PREFILL, FieldFlags, Setting, described
from server.platforms import Platform
from server.plugin import router

_SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_TYPES = {"integer": "whole number", "number": "number", "boolean": "true, false", "object": "object"}
Taker = tuple[str, type[Arguments]]


def settings() -> dict[str, Any]:
    """For docs/settings.md."""
    groups = [group for group in own_groups(_serve()) if not group.title.endswith("Arguments")]
    parts = [(part.name, part.Args) for known in PARTS.values() for part in known.values()]
    return {
        "groups": {group.title: [_flag(action) for action in group._group_actions] for group in groups},
        "arguments": {
            "kv": _arguments(KV, [*((policy.name, policy.Args) for policy in POLICIES), *parts]),
            "decode": _arguments(DECODE, [(selector.name, selector.Args) for selector in SELECTORS]),
            "prefill": _arguments(PREFILL, [(pattern.name, pattern.Args) for pattern in PATTERNS]),
        },
        "routes": [_route(route) for route in router.routes if isinstance(route, APIRoute)],
        "metrics": _metrics(),
        "exit_codes": EXIT_CODES,
    }


def commands() -> dict[str, Any]:
    """For docs/commands.md."""
    return {
        "commands": [
            (command, [_page(words, parser) for words, parser in _parsers(command).items()]) for command in COMMANDS
        ],
        "exit_codes": EXIT_CODES,
    }


def _serve() -> argparse.ArgumentParser:
    """The same on every machine."""
    return make_parser(Platform("cpu", None))


def _parsers(command: Command) -> dict[str, argparse.ArgumentParser]:
    return {"serve": _serve()} if command.name == "serve" else parsers_of(command)


def _page(words: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    actions = [action for action in parser._actions if not isinstance(action, argparse._SubParsersAction)]
    actions = [action for action in actions if not isinstance(action, argparse._HelpAction)]
    return {
        "words": words,
        "description": (parser.description or "").partition("\n\n")[0].replace("\n", " "),
        "examples": examples_of(parser),
        "flags": [] if words == "serve" else [_flag(action) for action in actions],
    }


def _flag(action: argparse.Action) -> dict[str, str]:
    """A row: the flag or what stands for a positional, its values, its default, what it is and what it costs."""
    flag = action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)
    text = " ".join((action.help or "").replace("%%", "%").replace(" (default: %(default)s)", "").split())
    advice = ADVICE.get(flag, "") if isinstance(action, Setting) else ""
    return {
        "flag": flag,
        "values": _values(action),
        "default": _default(action),
        "text": text.removesuffix(advice).strip(),
        "advice": advice,
    }


def _values(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if isinstance(action, Setting) and action.names:
        told = "name"  # the text lists them
    elif action.choices:
        told = ", ".join(map(str, action.choices))
    else:
        told = {int: "whole number", float: "number"}.get(action.type, str(action.metavar or "text"))  # type: ignore[call-overload]
    return f"{told}, several" if action.nargs in ("+", "*") else told


def _default(action: argparse.Action) -> str:
    if action.required or (not action.option_strings and action.nargs != "?"):
        return "needed"
    return "" if action.default in (None, True, False, argparse.SUPPRESS) else f"`{action.default}`"


def _arguments(family: FieldFlags, takers: list[Taker]) -> list[dict[str, str]]:
    """A row for each argument of a request's field."""
    return [
        {
            "name": argument.name,
            "flag": family.flag(argument.name),
            "allowed": _by_method({who: allowed(schema) for who, schema in argument.schemas.items()}),
            "default": _by_method({who: _spelled(schema) for who, schema in argument.schemas.items()}),
            "text": argument.text,
            "advice": ADVICE[family.flag(argument.name)],
        }
        for argument in described(takers)
    ]


def _spelled(schema: dict[str, Any]) -> str:
    return f"`{schema['default']}`" if "default" in schema else "needed"


def allowed(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "anyOf" in schema:
        return "tokens, or a share such as `25%`"
    if schema.get("type") == "array":
        return f"list of {allowed(schema['items'])}".replace("list of list of", "lists of")
    bounds = ", ".join(f"{sign} {schema[key]}" for key, sign in _SIGNS.items() if key in schema)
    return f"{_TYPES.get(schema.get('type', ''), 'text')} {bounds}".strip()


def _by_method(values: dict[str, str]) -> str:
    """What most methods have, then what others have, with their names."""
    who: dict[str, list[str]] = defaultdict(list)
    for method, value in values.items():
        who[value].append(method)
    (usual, _), *others = sorted(who.items(), key=lambda item: -len(item[1]))
    return "; ".join([usual, *(f"{', '.join(names)}: {value}" for value, names in others)])


def _route(route: APIRoute) -> dict[str, str]:
    text = inspect.cleandoc(route.endpoint.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    return {"route": f"{', '.join(sorted(route.methods))} {route.path}", "text": text}


def _metrics() -> list[dict[str, str]]:
    """What `server.metrics` registers, as `/metrics` names it."""
    registry: Any = CollectorRegistry()  # what it holds is private; its `collect` tells no labels before there are some
    kinds: list[tuple[str, Any]] = inspect.getmembers(metrics, inspect.isclass)
    for name, kind in kinds:
        if kind.__module__ == metrics.__name__ and name.endswith("Metrics"):
            blocks = {"blocks": 0} if "blocks" in inspect.signature(kind).parameters else {}
            kind("", **blocks, registry=registry)
    return [
        {
            "name": f"{found._name}_total" if found._type == "counter" else found._name,
            "kind": found._type,
            "labels": ", ".join(found._labelnames),
            "text": found._documentation,
        }
        for found in registry._collector_to_names
    ]
