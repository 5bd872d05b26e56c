"""The commands of `longreach`: what each is called and where it is found. Nothing else is imported before one runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: its word on the command line.
        summary: one line of `longreach --help`.
        module: has `parser()`, and `run(argv)` that carries it out.
        flags_of_serve: whether it takes those of `longreach serve` beside its own.
    """

    name: str
    summary: str
    module: str
    flags_of_serve: bool = False

    def parser(self) -> argparse.ArgumentParser:
        """What it takes, for `--help`, docs and shell completion."""
        parser: argparse.ArgumentParser = self._loaded().parser()
        return parser

    def run(self, argv: Sequence[str]) -> None:
        """Carry it out.

        Raises:
            SystemExit: with one of `EXIT_CODES`, except after success.
        """
        self._loaded().run(list(argv))

    def _loaded(self) -> Any:
        return import_module(self.module)


COMMANDS = (
    Command("serve", "serve a model over the OpenAI API", "server.commands.serve"),
    Command("policies", "list the KV-cache policies: what stays after the prompt", "server.commands.policies"),
    Command("selectors", "list the selectors: what each step of decoding reads", "server.commands.selectors"),
    Command("patterns", "list the patterns: what is computed of a prompt's attention", "server.commands.patterns"),
    Command("explain", "show which tokens of a prompt a policy keeps", "server.commands.explain", flags_of_serve=True),
    Command("head-gates", "measure which KV heads look far, for duoattention", "server.commands.head_gates"),
    Command("calibrate", "measure what some selectors and patterns need to know", "server.commands.calibrate"),
    Command("eval", "measure what policies, selectors and patterns lose", "server.commands.evaluate"),
    Command("loadtest", "measure how many long requests a server takes, and when it pays", "server.commands.loadtest"),
    Command("doctor", "say what this machine, or a model, can use", "server.commands.doctor", flags_of_serve=True),
    Command("keys", "make and look at API keys", "server.commands.keys"),
    Command("completion", "print a script that completes all this in a shell", "server.commands.completion"),
)

EXIT_CODES = {
    0: "done",
    1: "something failed while it ran",
    2: "the command line, the configuration or the model can't be used as asked; the last line on stderr says what to "
    "change",
    3: "the model isn't there, isn't whole, or can't be served",
    4: "too little memory for the model or its KV cache",
    5: "the address or port is in use, or not ours",
    6: "no room on a disk, or a folder that can't be written",
    7: "the engine didn't start for another reason, or died while it served",
    130: "interrupted, or stopped with requests unfinished",
}
