"""Longreach's own settings: flags beside vLLM's, and what vLLM has to be told for them."""

from __future__ import annotations

import argparse
import json
from typing import Any

from kvcache.registry import NONE, PolicyError, make_policy, policies, policy_words

_PREFIX = "kv_arg_"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--kv-policy` and one `--kv-ARGUMENT` for every argument that some policy takes."""
    group = parser.add_argument_group("KV compression (Longreach)")
    group.add_argument(
        "--kv-policy",
        default=NONE,
        metavar="NAME",
        help=f"Policy of requests that name none: {', '.join([NONE, *policies()])}. Default: none.",
    )
    for name, (text, takers) in _arguments().items():
        group.add_argument(
            f"--kv-{name.replace('_', '-')}",
            dest=_PREFIX + name,
            default=None,
            metavar="VALUE",
            help=f"{text} ({', '.join(takers)})".replace("%", "%%"),
        )


def _arguments() -> dict[str, tuple[str, list[str]]]:
    """Every policy argument with its description and the policies that take it."""
    found: dict[str, tuple[str, list[str]]] = {}
    for policy in policies().values():
        for name, schema in policy.Args.model_json_schema()["properties"].items():
            found.setdefault(name, (schema.get("description", ""), []))[1].append(policy.name)
    return found


def default_policy(args: argparse.Namespace) -> dict[str, Any]:
    """The server's default policy from the flags, every argument spelled out.

    Raises:
        SystemExit: a flag is wrong; the message says what is allowed.
    """
    given = {
        key.removeprefix(_PREFIX): _value(value)
        for key, value in vars(args).items()
        if key.startswith(_PREFIX) and value is not None
    }
    try:
        return policy_words(make_policy({"policy": args.kv_policy, **given}))
    except PolicyError as error:
        flag = "--" + error.field.replace("kv_cache.", "kv-").replace("_", "-")
        raise SystemExit(f"longreach: {flag}: {error.problem} Allowed: {error.allowed}.") from None


def _value(text: str) -> Any:
    """A flag's text as a request would say it: 512 is a number, 25% and avg are strings."""
    try:
        return json.loads(text)
    except ValueError:
        return text
