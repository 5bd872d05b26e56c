"""`longreach selectors`."""

from __future__ import annotations

import argparse
from typing import Any

from server.commands.listings import listed, listing_parser


def parser() -> argparse.ArgumentParser:
    return listing_parser("selectors", "List the selectors: what each step of decoding reads of the cache.")


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)

    from attention_plugins.decode.registry import DENSE, selectors
    from server.selectors import needs_of

    def needs(described: dict[str, Any]) -> str:
        return ", ".join(needs_of(described)) or "nothing"

    listed(selectors(), args.json, f"{DENSE}\n    Read everything: stock vLLM.", needs)
