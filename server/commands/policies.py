"""`longreach policies`."""

from __future__ import annotations

import argparse
from typing import Any

from server.commands.listings import listed, listing_parser


def parser() -> argparse.ArgumentParser:
    return listing_parser("policies", "List the KV-cache policies with arguments, defaults, needs and papers.")


def run(argv: list[str]) -> None:
    args = parser().parse_args(argv)

    from kvcache.registry import NONE, policies

    listed(policies(), args.json, f"{NONE}\n    Keep everything: stock vLLM.", _needs)


def _needs(policy: dict[str, Any]) -> str:
    asks = f"{policy['evidence']}{', looks at the question' if policy['query_aware'] else ''}"
    return f"{asks}{', layers differ in length' if policy['layer_lengths_differ'] else ''}"
