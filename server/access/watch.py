"""The file of keys, read again when it changes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from vllm.logger import init_logger

from server.access.keys import Key, read_keys
from server.errors import StartError

logger = init_logger("vllm.longreach.access")  # below vLLM's, whose handlers and level it takes
EVERY = 1.0
"""Seconds between two looks at the file; a secret that Kubernetes mounts is replaced whole, which is seen too."""


class KeyFile:
    """The keys of now. A change that can't be read leaves the keys as they were, and is told in the log."""

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises:
        StartError: the file can't be read, or is wrong.
        """
        self.file, self.clock = file, clock
        self._state = self._look()
        self._keys = read_keys(file)
        self._next = clock() + EVERY

    @property
    def keys(self) -> tuple[Key, ...]:
        if self.clock() >= self._next:
            self._next = self.clock() + EVERY
            if (state := self._look()) != self._state:
                self._state = state
                self._read()
        return self._keys

    def _look(self) -> tuple[int, int, int] | None:
        try:
            found = self.file.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _read(self) -> None:
        try:
            keys = read_keys(self.file)
        except StartError as error:
            logger.error("%s. The keys stay as they were.", error)
            return
        logger.info("--api-key-file %s has changed: %d keys.", self.file, len(keys))
        self._keys = keys
