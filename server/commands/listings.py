"""What `longreach policies`, `selectors` and `patterns` have in common."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

from server.commands.ending import reader_may_leave
from server.commands.parsers import command_parser


def listing_parser(command: str, description: str) -> argparse.ArgumentParser:
    """Parser of a command that lists methods."""
    parser = command_parser(command, description, f"longreach {command}", f"longreach {command} --json")
    parser.add_argument("--json", action="store_true", help="as JSON, with every argument's schema")
    return parser


def listed(known: Mapping[str, Any], as_json: bool, first: str, needs: Callable[[dict[str, Any]], str]) -> None:
    """Print methods with their arguments, behind what stands for none of them."""
    described = [method.describe() for method in known.values()]
    with reader_may_leave():
        if as_json:
            print(json.dumps(described, indent=2))
            return
        print(first)
        for method in described:
            print(f"\n{method['name']}\n    {method['title']} ({method['paper']})")
            print(f"    needs: {needs(method)}")
            for name, schema in method["arguments"]["properties"].items():
                value = repr(schema["default"]) if "default" in schema else "(needed)"
                print(f"      {name} = {value:12} {schema.get('description', '')}")
