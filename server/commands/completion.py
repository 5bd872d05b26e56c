"""`longreach completion`."""

from __future__ import annotations

import argparse

from server.commands.ending import reader_may_leave
from server.commands.parsers import command_parser

SHELLS = ("bash", "zsh", "fish")


def parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "completion",
        "Print a script that completes commands, flags, names and files in a shell. It holds all of them, so that "
        "pressing Tab starts nothing; print it again after an update.",
        "longreach completion bash > ~/.local/share/bash-completion/completions/longreach",
        "longreach completion zsh > ~/.zfunc/_longreach",
        "longreach completion fish > ~/.config/fish/completions/longreach.fish",
    )
    parser.add_argument("shell", choices=SHELLS, help="which shell's")
    return parser


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)

    from server.completion import script

    with reader_may_leave():
        print(script(args.shell))
