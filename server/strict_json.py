"""Reads JSON of strangers: what isn't JSON, or no number or text that the engine could use, ends here."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


class BadJSON(ValueError):
    """The body can't be read; `param` is the place in it, where there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def read_json(body: bytes, most_nested: int) -> Any:
    """The value that a JSON text stands for.

    Beside what Python's reader refuses: NaN and Infinity, which it takes though JSON has none; numbers too large for a
    float, which it takes for infinite; halves of surrogate pairs, which are no text and can't be encoded again.

    Args:
        most_nested: levels of lists and objects.

    Raises:
        BadJSON: it isn't JSON, is nested deeper, or has one of these.
    """
    try:
        content = json.loads(body, parse_constant=_refuse)
    except RecursionError:
        raise _too_deep(most_nested) from None
    except UnicodeDecodeError as error:
        raise BadJSON(f"The body isn't UTF-8: byte {error.start} ({body[error.start]:#04x}).") from None
    except json.JSONDecodeError as error:
        raise BadJSON(f"The body isn't JSON: {error}.") from None
    except BadJSON:
        raise
    except ValueError:  # Python's limit of digits of one number
        raise BadJSON("The body has a number of too many digits.") from None
    _look_through(content, most_nested)
    return content


def _refuse(name: str) -> NoReturn:
    raise BadJSON(f"The body isn't JSON: {name} is no number there.")


def _too_deep(most_nested: int) -> BadJSON:
    return BadJSON(f"The body is nested too deep; allowed are {most_nested} levels of lists and objects.")


def _look_through(content: Any, most_nested: int) -> None:
    """Level by level, without recursion."""
    level, depth = [("", content)], 0
    while level:
        below: list[tuple[str, Any]] = []
        for path, value in level:
            if isinstance(value, dict):
                for key, item in value.items():
                    _check_text(key, path)
                    if type(item) not in _HARMLESS:
                        _sort(f"{path}.{key}" if path else key, item, below)
            elif isinstance(value, list):
                if not _HARMLESS.issuperset(map(type, value)):
                    for place, item in enumerate(value):
                        _sort(f"{path}[{place}]", item, below)
            else:
                _sort(path, value, [])
        depth += 1
        if below and depth >= most_nested:
            raise _too_deep(most_nested)
        level = below


_HARMLESS = {int, bool, type(None)}


def _sort(path: str, item: Any, below: list[tuple[str, Any]]) -> None:
    if isinstance(item, dict | list):
        below.append((path, item))
    elif isinstance(item, str):
        _check_text(item, path)
    elif isinstance(item, float) and not math.isfinite(item):
        raise BadJSON(f"{path or 'The body'}: the number is too large.", path or None)


def _check_text(text: str, path: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise BadJSON(f"{path or 'The body'}: half of a surrogate pair isn't text.", path or None) from None
