"""How commands end: in one line that says what to change, or quietly when nobody reads any further."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


def fail(message: object, code: int = 2) -> NoReturn:
    """End with one line on stderr and an exit code."""
    print(f"longreach: {message}", file=sys.stderr)
    raise SystemExit(code)


@contextmanager
def start_errors() -> Iterator[None]:
    """What may be wrong with a command line, a model or this machine ends in one line and an exit code of its kind."""
    from attention_plugins.decode.registry import selectors
    from attention_plugins.prefill.registry import patterns
    from kvcache.registry import policies
    from kvcache.vllm_adapter.compat import IncompatibleVLLM
    from server.embedded import EmbeddedModelError
    from server.errors import EngineDied, StartError, exit_code, one_line

    try:
        policies()
        selectors()
        patterns()
    except (ValueError, ImportError, AttributeError) as error:
        fail(f"a package with a KV-cache policy, a selector or a pattern can't be used: {one_line(error)}")
    try:
        yield
    except (StartError, IncompatibleVLLM, EmbeddedModelError, EngineDied) as error:
        logging.getLogger("vllm").debug("why:", exc_info=True)
        fail(one_line(error), exit_code(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """End quietly when the output goes to a program, such as head, that has read enough."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer would fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
