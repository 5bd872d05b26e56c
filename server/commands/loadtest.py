"""`longreach loadtest`."""

from __future__ import annotations

import argparse

from server.commands.ending import reader_may_leave


def parser() -> argparse.ArgumentParser:
    from benchmarks.loadtest.cli import arguments

    return arguments()


def run(argv: list[str]) -> None:
    from benchmarks.loadtest.cli import main

    with reader_may_leave():
        code = main(argv)
    if code:
        raise SystemExit(code)
