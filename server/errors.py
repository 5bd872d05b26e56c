"""What ends the server: before it listens, or after."""

from __future__ import annotations

import errno
from enum import IntEnum
from typing import Any


class Exit(IntEnum):
    """Exit codes of a server that doesn't start, or doesn't stop as it was told to (docs/faults.md)."""

    USAGE = 2
    MODEL = 3
    MEMORY = 4
    ADDRESS = 5
    DISK = 6
    ENGINE = 7
    INTERRUPTED = 130


class StartError(RuntimeError):
    """The server can't start as asked; the message is one line and says what to change."""

    def __init__(self, message: str, code: Exit | None = None) -> None:
        super().__init__(message)
        self.code = code


class EngineDied(RuntimeError):
    """The engine ended while it served; requests under way have been told."""

    code = Exit.ENGINE


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of a disk that takes no more, or nothing."""


def exit_code(error: BaseException) -> int:
    """The exit code of an error: its own, or what its cause says."""
    cause: BaseException | None = error
    while cause is not None:
        if code := getattr(cause, "code", None):
            return int(code)
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            return Exit.DISK
        cause = cause.__cause__
    return Exit.USAGE


def _part(part: Any) -> str:
    where = ".".join(str(name) for name in part["loc"])
    text = str(part["msg"]).removeprefix("Value error, ")
    return f"{where}: {text}" if where else text


def one_line(error: BaseException) -> str:
    """The message of an error of vLLM's or a library's, without its line breaks and pydantic's frame."""
    from pydantic import ValidationError  # not above: a supervisor needs the codes alone

    if isinstance(error, ValidationError):
        text = "; ".join(dict.fromkeys(map(_part, error.errors(include_url=False))))
    elif isinstance(error, KeyError) and error.args:  # str() of it is quoted
        text = str(error.args[0])
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())
