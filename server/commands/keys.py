"""`longreach keys`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from server.commands.ending import fail
from server.commands.parsers import command_parser


def parser() -> argparse.ArgumentParser:
    from server.access.keys import AREAS

    parser = command_parser(
        "keys",
        "Make and look at API keys for `longreach serve --api-key-file`. To take one back, delete its line.",
        "longreach keys add alice --file keys.txt --requests 60 --tokens 200000 --concurrent 4",
        "longreach keys add prometheus --file keys.txt --for metrics",
        "longreach keys list --file keys.txt",
        "longreach keys check --file keys.txt < key.txt",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="add | list | check")
    add = commands.add_parser("add", help="make a key, write its hash to the file, and print it, once")
    add.add_argument("name", help="in logs, metrics and messages")
    add.add_argument("--for", dest="areas", nargs="+", choices=AREAS, default=["api"], help="what it opens (api)")
    add.add_argument("--requests", type=int, metavar="N", help="most a minute")
    add.add_argument("--tokens", type=int, metavar="N", help="most a minute, of prompts and answers")
    add.add_argument("--concurrent", type=int, metavar="N", help="most requests at a time")
    add.add_argument("--own-cache", action="store_true", help="its prompts share no prefix with other keys'")
    shown = commands.add_parser("list", help="the keys' names and limits")
    check = commands.add_parser("check", help="whose key it is that stdin holds; exit code 1 if nobody's")
    for command in (add, shown, check):
        command.add_argument("--file", required=True, type=Path, help="the file of keys")
    return parser


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)

    from server.access.keys import find_key, read_keys
    from server.errors import StartError

    try:
        if args.command == "add":
            return _add(args)
        keys = read_keys(args.file)
    except StartError as error:
        fail(error)
    if args.command == "list":
        for key in keys:
            print(" ".join(key.line().split()[:1] + key.line().split()[2:]))
        return
    found = find_key(keys, sys.stdin.readline().strip())
    print(found.name if found else "no key of this file")
    if not found:
        raise SystemExit(1)


def _add(args: argparse.Namespace) -> None:
    """Raises:
    StartError: the file is wrong already.
    """
    from server.access.keys import new_key, read_keys

    there = args.file.exists() and args.file.stat().st_size > 0
    if there and any(key.name == args.name for key in read_keys(args.file)):
        fail(f"{args.file} has a key named {args.name}: choose another name, or delete its line")
    limits = {"areas": tuple(args.areas), "requests": args.requests, "tokens": args.tokens,
              "concurrent": args.concurrent, "own_cache": args.own_cache}  # fmt: skip
    try:
        secret, key = new_key(args.name, **limits)
        with os.fdopen(os.open(args.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+", encoding="utf-8") as file:
            text = file.read()
            file.write(("\n" if text and not text.endswith("\n") else "") + key.line() + "\n")
    except ValueError as error:
        fail(error)
    except OSError as error:
        fail(f"{args.file}: {error.strerror}")
    print(secret)
    print(f"The key of {key.name}. It is shown this once; {args.file} has its hash.", file=sys.stderr)
