"""What every command has, whichever it is: a line in `longreach --help`, a help with examples that are right."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from server.advice import ADVICE
from server.cli import main, usage
from server.commands import COMMANDS, Command
from server.commands.parsers import command_parser, examples_of
from server.commands.reference import own_groups, parsers_of
from server.flags import Setting

ROOT = Path(__file__).resolve().parents[3]
Parsers = Callable[[Command], dict[str, argparse.ArgumentParser]]


@pytest.fixture(scope="module")
def parsers() -> Parsers:
    made: dict[str, dict[str, argparse.ArgumentParser]] = {}
    return lambda command: made.setdefault(command.name, parsers_of(command))


every_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    yield from (action for action in parser._actions if not isinstance(action, argparse._SubParsersAction))


def test_the_overview_has_a_line_for_each_and_imports_nothing_slow() -> None:
    code = "import sys, server.cli; server.cli.main(['--help']); sys.exit(bool({'torch', 'vllm'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", usage() + "\n")
    lines = usage().splitlines()
    assert all(len(line) < 110 for line in lines)
    assert [line.split()[0] for line in lines if line.startswith("  ")] == [command.name for command in COMMANDS]


@every_command
def test_every_help_has_examples_that_its_parser_takes(command: Command, parsers: Parsers) -> None:
    found = parsers(command)
    examples = [example for parser in found.values() for example in examples_of(parser)]
    assert examples and all(example in "\n".join(p.format_help() for p in found.values()) for example in examples)
    for example in examples:
        words = shlex.split(re.split(" [<>] | -- ", example)[0])
        assert words[:2] == ["longreach", command.name]
        if command.flags_of_serve:
            _, flags = found[command.name].parse_known_args(words[2:])
            parsers(COMMANDS[0])["serve"].parse_args(flags)
        elif "--config" not in words:  # which would be read
            found[command.name].parse_args(words[2:])


@every_command
def test_every_flag_says_what_it_does(command: Command, parsers: Parsers) -> None:
    if command.name == "serve":
        told = [action for group in own_groups(parsers(command)["serve"]) for action in group._group_actions]
    else:
        told = [action for parser in parsers(command).values() for action in options(parser)]
    assert told
    silent = [action.dest for action in told if not (action.help or "").strip()]
    assert not silent, f"no help: {silent}"


def test_every_flag_of_the_server_says_what_it_costs(parsers: Parsers) -> None:
    """When this fails: a line in server/advice.py."""
    actions = [action for group in own_groups(parsers(COMMANDS[0])["serve"]) for action in group._group_actions]
    flags = {flag for action in actions for flag in action.option_strings if flag.startswith("--")}
    assert flags - ADVICE.keys() == set(), "without advice"
    assert ADVICE.keys() - flags == set(), "advice for flags that there aren't"
    for action in actions:
        assert isinstance(action, Setting)
        assert ADVICE[action.option_strings[-1]] in (action.help or "").replace("%%", "%")


def test_defaults_are_told_where_there_are_some() -> None:
    parser = command_parser("x", "What it does.", "longreach x", "longreach x --n 2")
    parser.add_argument("--n", type=int, default=7, help="a number")
    parser.add_argument("--file", help="a file")
    parser.add_argument("--loud", action="store_true", help="say more")
    text = " ".join(parser.format_help().split())
    assert "a number (default: 7)" in text and text.count("(default:") == 1
    assert examples_of(parser) == ["longreach x", "longreach x --n 2"]


def test_unknown_commands_get_a_proposal(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["polices"])
    assert end.value.code == 2
    assert "unknown command 'polices' (did you mean policies?); there are serve" in capsys.readouterr().err
