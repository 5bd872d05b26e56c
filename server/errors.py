"""What goes wrong before the server listens."""

from __future__ import annotations

from pydantic import ValidationError


class StartError(RuntimeError):
    """The server can't start as asked; the message is one line and says what to change."""


def one_line(error: BaseException) -> str:
    """The message of an error of vLLM's or a library's, without its line breaks and pydantic's frame."""
    if isinstance(error, ValidationError):
        text = "; ".join(part["msg"].removeprefix("Value error, ") for part in error.errors(include_url=False))
    elif isinstance(error, KeyError) and error.args:  # str() of it is quoted
        text = str(error.args[0])
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())
