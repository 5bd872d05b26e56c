"""Why an engine didn't start: what its workers tell (`kvcache.vllm_adapter.start_faults`), in one line with a code."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import psutil

from kvcache.vllm_adapter.start_faults import address
from server.errors import NO_ROOM, Exit, StartError

_MEMORY = ("out of memory", "OutOfMemoryError", "MemoryError", "not enough memory", "can't allocate memory",
           "No available memory for the cache blocks", "KV cache is needed", "requested memory",
           "Free memory on device")  # fmt: skip
"""Words of torch's, CUDA's and vLLM's errors where memory is what lacks."""
_CHANGE = {
    Exit.MEMORY: "Lower --max-model-len, --max-num-seqs or --gpu-memory-utilization, change --kv-cache-memory-bytes, "
    "or end what else holds the memory",
    Exit.DISK: "Free space where it writes, or move the caches (XDG_CACHE_HOME, VLLM_CACHE_ROOT, TRITON_CACHE_DIR)",
    Exit.MODEL: "Copy or download the model again, see that its files may be read, or choose another",
    Exit.ENGINE: "VLLM_LOGGING_LEVEL=DEBUG shows where",
}
_LONGEST = 300
"""Characters of an error: some list all of a model's weights."""


def explain(step: str, chain: list[dict[str, Any]]) -> StartError:
    """What a worker told, for the user.

    Args:
        step: method of vLLM's worker that failed.
        chain: an error and its causes, each with `type`, `errno` and `text`.
    """
    if any(part["errno"] in NO_ROOM or "No space left" in part["text"] for part in chain):
        code = Exit.DISK
    elif any(word in f"{part['type']}: {part['text']}" for part in chain for word in _MEMORY):
        code = Exit.MEMORY
    else:
        code = Exit.MODEL if step == "load_model" else Exit.ENGINE
    text = " ".join(chain[0]["text"].partition("\n")[0].partition(" See https://")[0].split())
    text = text or chain[0]["type"].rpartition(".")[2]
    text = f"{text[:_LONGEST]} ..." if len(text) > _LONGEST else text.rstrip(".")
    return StartError(f"the engine didn't start: {text}. {_CHANGE[code]}", code)


def kill_children() -> None:
    """End the engine and its workers at once, before they print anything."""
    for process in psutil.Process().children(recursive=True):
        try:
            if not any("resource_tracker" in word for word in process.cmdline()):  # it cleans up after the others
                process.kill()
        except psutil.Error:
            pass  # it has ended


class StartWatch:
    """Listens, while it is entered, for what ends the start of an engine; the first error stays in `error`."""

    def __init__(self, instance_id: str, kill: Callable[[], None] = kill_children) -> None:
        self.error: StartError | None = None
        self._kill = kill
        self._line = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._line.bind(address(instance_id))
        self._thread = threading.Thread(target=self._listen, name="start watch", daemon=True)

    def __enter__(self) -> StartWatch:
        self._thread.start()
        return self

    def _listen(self) -> None:
        while told := self._line.recv(1 << 16):
            if self.error is None:
                self.error = explain(**json.loads(told))
                self._kill()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"", self._line.getsockname())
        self._thread.join()
        self._line.close()
