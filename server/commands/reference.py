"""What commands take, as data: for docs, shell completion and the tests of both."""

from __future__ import annotations

import argparse
from typing import Any

from server.commands import Command


def parsers_of(command: Command) -> dict[str, argparse.ArgumentParser]:
    """A command's parser, and those of its own sub-commands, by the words that reach them (`eval run`)."""
    parser = command.parser()
    return {command.name: parser, **{f"{command.name} {name}": own for name, own in _subparsers(parser).items()}}


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update(action.choices)
    return found


def own_groups(parser: argparse.ArgumentParser) -> list[Any]:
    """The groups of `longreach serve` that vLLM's parser doesn't have."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    theirs = {group.title for group in make_arg_parser(FlexibleArgumentParser())._action_groups}
    return [group for group in parser._action_groups if group.title not in theirs]
