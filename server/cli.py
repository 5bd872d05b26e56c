"""The command `longreach`: finds the command that is asked for (`server.commands`)."""

from __future__ import annotations

import difflib
import sys

from server.commands import COMMANDS
from server.commands.ending import fail

_NAMES = [command.name for command in COMMANDS]


def usage() -> str:
    """What `longreach --help` prints."""
    width = max(map(len, _NAMES))
    lines = [f"  {command.name:{width}}  {command.summary}" for command in COMMANDS]
    return "\n".join(
        [
            "usage: longreach COMMAND ...",
            "",
            "Serve long prompts with a KV cache that shrinks, is read in part, and is attended in part: vLLM and more.",
            "",
            "commands:",
            *lines,
            "",
            "longreach COMMAND --help   its flags, with an example",
            "longreach --version",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script.

    Raises:
        SystemExit: with the exit code, except after success.
    """
    first, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if first in ("-h", "--help", "help"):
        print(usage())
    elif first in ("-V", "--version"):
        from importlib.metadata import version

        print(version("longreach"))
    elif first in _NAMES:
        COMMANDS[_NAMES.index(first)].run(rest)
    else:
        near = difflib.get_close_matches(first, _NAMES, n=1)
        proposal = f" (did you mean {near[0]}?)" if near else ""
        fail(f"unknown command {first!r}{proposal}; there are {', '.join(_NAMES)}")


if __name__ == "__main__":
    main()
