"""Parsers of commands: a wrapped description, defaults told, and examples at the end."""

from __future__ import annotations

import argparse
from typing import Any

_EXAMPLES = "examples:\n  "


class _Formatter(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(_EXAMPLES) else super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.default not in (None, False, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if told and action.help else action.help


def command_parser(name: str, description: str, *examples: str, **more: Any) -> argparse.ArgumentParser:
    """Parser of `longreach NAME`, whose help ends with example command lines.

    Args:
        more: further arguments of `argparse.ArgumentParser`.
    """
    return argparse.ArgumentParser(
        prog=f"longreach {name}", description=description, epilog=epilog(*examples), formatter_class=_Formatter, **more
    )


def epilog(*examples: str) -> str:
    """Example command lines at the end of a help; parsers of other formatters need to leave it as it is."""
    return _EXAMPLES + "\n  ".join(examples)


def examples_of(parser: argparse.ArgumentParser) -> list[str]:
    """The example command lines of a parser."""
    _, found, lines = (parser.epilog or "").partition(_EXAMPLES)
    return [line.strip() for line in lines.splitlines() if line.strip().startswith("longreach ")] if found else []
