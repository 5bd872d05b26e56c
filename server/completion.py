"""Scripts that complete `longreach` in a shell, from the parsers of all commands."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import shtab

from server.commands import COMMANDS
from server.flags import Setting

_FILES = ("FILE", "PROMPT_FILE", "PROMPT_FILE|-", "SWEEP.yaml", "SUMMARY.json")
_FOLDERS = ("DIR", "MODEL")
_THEIRS = {"--config": shtab.FILE, "--chat-template": shtab.FILE, "--download-dir": shtab.DIRECTORY}
"""Flags of vLLM's that take a path."""


def script(shell: str) -> str:
    """The script for a shell, one of `shtab.SUPPORTED_SHELLS`."""
    return str(shtab.complete(whole(), shell))


def whole() -> argparse.ArgumentParser:
    """One parser with all commands, their flags marked with what completes them."""
    parsers = {command.name: command.parser() for command in COMMANDS}
    serve = parsers["serve"]
    for command in COMMANDS:
        if command.flags_of_serve:
            parsers[command.name] = _with_flags_of(serve, parsers[command.name])
    for parser in parsers.values():
        for action in _actions(parser):
            _mark(action)
    for command in COMMANDS:
        parsers[command.name].description = command.summary
    root = argparse.ArgumentParser(prog="longreach")
    root.add_argument("--version", "-V", action="store_true", help="print the version")
    commands = root.add_subparsers(parser_class=lambda prog, **_: parsers[prog.split()[-1]])  # type: ignore[call-overload]
    for command in COMMANDS:
        commands.add_parser(command.name, help=command.summary)
    return root


def _with_flags_of(serve: argparse.ArgumentParser, own: argparse.ArgumentParser) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=own.prog, parents=[own, serve], conflict_handler="resolve", add_help=False)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for own in action.choices.values():
                yield from _actions(own)
        else:
            yield action


def _mark(action: argparse.Action) -> None:
    """Give a flag its names, files or folders, and a help of one short line."""
    if isinstance(action, Setting) and action.names:
        action.choices = action.names
    path = shtab.FILE if action.metavar in _FILES else shtab.DIRECTORY if action.metavar in _FOLDERS else None
    if action.dest in ("model_tag", "model"):
        path = shtab.DIRECTORY
    for flag in action.option_strings:
        path = _THEIRS.get(flag, path)
    if path and not action.choices:
        action.complete = path  # type: ignore[attr-defined]
    if action.help and action.help is not argparse.SUPPRESS:
        action.help = _first_sentence(action.help)


def _first_sentence(text: str) -> str:
    """Short, on one line, and without anything that a formatter would fill in."""
    text = " ".join(text.replace("%%", "%").split())
    sentence = text.partition(". ")[0].removesuffix(".")
    return sentence.replace("%(default)s", "").replace("%", "%%")
