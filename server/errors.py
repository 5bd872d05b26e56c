"""What goes wrong before the server listens."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError


class StartError(RuntimeError):
    """The server can't start as asked; the message is one line and says what to change."""


def _part(part: Any) -> str:
    where = ".".join(str(name) for name in part["loc"])
    text = str(part["msg"]).removeprefix("Value error, ")
    return f"{where}: {text}" if where else text


def one_line(error: BaseException) -> str:
    """The message of an error of vLLM's or a library's, without its line breaks and pydantic's frame."""
    if isinstance(error, ValidationError):
        text = "; ".join(dict.fromkeys(map(_part, error.errors(include_url=False))))
    elif isinstance(error, KeyError) and error.args:  # str() of it is quoted
        text = str(error.args[0])
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())
