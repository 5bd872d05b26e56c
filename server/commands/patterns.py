"""`longreach patterns`."""

from __future__ import annotations

import argparse
from typing import Any

from server.commands.listings import listed, listing_parser


def parser() -> argparse.ArgumentParser:
    return listing_parser("patterns", "List the patterns: what is computed of a prompt's attention.")


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)

    from attention_plugins.prefill.registry import DENSE, patterns
    from server.patterns import needs_of

    def needs(described: dict[str, Any]) -> str:
        return ", ".join(needs_of(described)) or "nothing"

    listed(patterns(), args.json, f"{DENSE}\n    Attend to everything: stock vLLM.", needs)
