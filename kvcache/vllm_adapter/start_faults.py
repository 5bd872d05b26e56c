"""What ends a worker's start, told to the process that started the engine before vLLM prints a traceback for each.

A worker that fails sends the error and waits to be killed; `server.faults` listens, kills the engine and says in one
line what to change. Only the standard library is imported here: a worker may be short of anything else.
"""

from __future__ import annotations

import functools
import json
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

STARTING = ("init_device", "load_model", "determine_available_memory", "initialize_from_config",
            "compile_or_warm_up_model")  # fmt: skip
"""Methods of vLLM's workers that its engine calls before it serves."""
PATIENCE = 10.0
"""Seconds until a worker that nobody kills goes on, as vLLM's would have."""


def address(instance_id: str) -> str:
    """Where the errors of one engine go: a Unix socket without a file (Linux), by vLLM's name of the run."""
    return f"\0longreach-start-{instance_id}"


def tell(instance_id: str, step: str, error: BaseException) -> bool:
    """Send an error with its causes, and the step that it ended. Returns whether somebody listens."""
    chain: list[dict[str, Any]] = []
    cause: BaseException | None = error
    while cause is not None and len(chain) < 8:
        name = f"{type(cause).__module__}.{type(cause).__qualname__}"
        chain.append({"type": name, "errno": getattr(cause, "errno", None), "text": str(cause)[:2000]})
        cause = cause.__cause__ or cause.__context__
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        try:
            line.sendto(json.dumps({"step": step, "chain": chain}).encode(), address(instance_id))
        except OSError:  # vLLM's own command, or an engine inside a process
            return False
    return True


def telling(worker: type) -> type:
    """Decorate a worker's class: errors of its start are told."""
    for name in STARTING:
        setattr(worker, name, _told(getattr(worker, name)))
    return worker


def _told(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            told = tell(self.vllm_config.instance_id, method.__name__, error)
            if told and not logging.getLogger("vllm").isEnabledFor(logging.DEBUG):
                time.sleep(PATIENCE)
            raise

    return run
