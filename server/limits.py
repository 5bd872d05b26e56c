"""What one client may send, and how long it may take: flags, and the limits that they make."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from server.errors import StartError
from server.flags import add_setting

BODY_BASE, BODY_PER_TOKEN = 4 << 20, 64
"""Bytes of the largest body: some, and so many for each token of the model's context. A token of text takes about 4,
of text that is all escaped (`\\u4e00`) 6 to 12, of a list of token numbers 8; so several whole prompts fit."""
BYTES_PER_SECOND = 16 << 10
"""A body that comes this fast may take as long as it likes."""
MOST_NESTED = 64
"""Levels of lists and objects in a JSON body. Nothing that vLLM reads needs 20; schemas of tools may."""


@dataclass(frozen=True)
class Limits:
    """Of one server.

    Attributes:
        body_bytes: largest body.
        header_bytes: largest head of a request: its line, names and values.
        header_count: most header fields.
        client_seconds: how long a client may take for a request's head, for its body (longer where it comes at
            `BYTES_PER_SECOND`), and to read what it was sent.
    """

    body_bytes: int
    header_bytes: int = 64 << 10
    header_count: int = 256
    client_seconds: float = 60.0


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags; the number of header fields is vLLM's own, `--h11-max-header-count`."""
    group = parser.add_argument_group("Limits", "What one client may send, and how slowly; docs/bad-input.md.")
    text = "Largest body of a request; larger ones are answered by 413 as they come. Left out: 4 MiB and "
    text += f"{BODY_PER_TOKEN} bytes for each token of the model's context."
    add_setting(group, "--max-body-bytes", text, type=int, metavar="N")
    text = "Largest head of a request, its line and all header fields; larger ones are answered by 431."
    add_setting(group, "--max-header-bytes", text, default=Limits.header_bytes, type=int, metavar="N")
    text = "How long a client may take to send a request's head, to send its body (longer at 16 KiB a second), and to "
    text += "read its answer; slow ones are answered by 408 or cut off. Computing may take any time."
    add_setting(group, "--client-timeout", text, default=Limits.client_seconds, type=float, metavar="SECONDS")


def make_limits(args: argparse.Namespace, context: int | None = None) -> Limits:
    """The limits that the flags make.

    Args:
        context: tokens of the model's context; None while it isn't known.

    Raises:
        StartError: a limit that leaves no room for requests.
    """
    for flag, value, least in (
        ("--max-body-bytes", args.max_body_bytes, 1024),
        ("--max-header-bytes", args.max_header_bytes, 1024),
        ("--h11-max-header-count", args.h11_max_header_count, 16),
        ("--client-timeout", args.client_timeout, 1),
    ):
        if value is not None and not least <= value < float("inf"):
            raise StartError(f"{flag}: {value} is too small or not a number; allowed are {least} and more.")
    body = args.max_body_bytes or BODY_BASE + BODY_PER_TOKEN * (context or 0)
    return Limits(body, args.max_header_bytes, args.h11_max_header_count, args.client_timeout)
