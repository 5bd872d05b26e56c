"""The flags of access, and what they make."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from server.access.meters import Meters
from server.access.metrics import key_metrics
from server.access.middleware import Access
from server.access.watch import KeyFile
from server.errors import StartError
from server.flags import add_setting

OPEN = ("/health", "/ready", "/ping")
"""What probes ask, and what tells nothing."""


def add_access_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Access", "Who may use the server, and how much; docs/security.md.")
    text = "API keys, hashed, one a line with its limits, as `longreach keys add` writes; read again on changes."
    add_setting(group, "--api-key-file", text, metavar="FILE")
    text = "Paths that need no key where there is a file of keys, with all below them."
    add_setting(group, "--open-paths", text, nargs="*", default=list(OPEN), metavar="PATH")


def make_access(args: argparse.Namespace) -> Access | None:
    """What the flags say; None without a file of keys.

    Raises:
        StartError: the file is wrong, or vLLM's own key is set too.
    """
    if args.api_key_file is None:
        return None
    if args.api_key or os.environ.get("VLLM_API_KEY"):
        raise StartError(
            "--api-key-file with vLLM's --api-key (or VLLM_API_KEY): requests would need both keys in one header. "
            "Leave vLLM's out; `longreach keys add` makes one for the file."
        )
    if wrong := [path for path in args.open_paths if not path.startswith("/") or path == "/"]:
        raise StartError(f"--open-paths: {wrong[0]!r} is no path below /, such as /metrics")
    paths = tuple(path.rstrip("/") for path in args.open_paths)
    return Access(KeyFile(Path(args.api_key_file).expanduser()), paths, key_metrics(), Meters())
