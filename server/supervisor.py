"""`longreach serve --supervise`: a small parent that starts the server again when it ends without being told to.

It imports neither vLLM nor torch, so that little can break it. The server is its child, which gets its signals and is
told to stop when its parent is killed. Linux only, like vLLM.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import psutil

from server.errors import Exit

RESTARTS, WINDOW = 5, 600.0
"""More restarts than that in so many seconds are given up: starting again doesn't help."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before a restart; each one in the window waits twice as long as the one before."""
AS_TOLD = (0, Exit.INTERRUPTED, -signal.SIGTERM, -signal.SIGINT)
"""Ends that somebody wanted."""
HOPELESS = (Exit.USAGE, Exit.MODEL, Exit.MEMORY, Exit.ADDRESS, Exit.DISK)
"""Ends of a first start that a second one would share. After a server that ran they may pass, and are tried again."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class Supervisor:
    """Keeps one server running.

    Args:
        command: starts the server.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self._told = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._prctl = ctypes.CDLL(None, use_errno=True).prctl

    def run(self) -> int:
        """Run the server until it ends as told, can't start, or ends too often. Returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        self._prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what a killed server leaves becomes ours to end
        restarts: deque[float] = deque()
        first = True
        while True:
            begin = time.monotonic()
            code = self._run_once()
            now = time.monotonic()
            if self._told.is_set() or code in AS_TOLD or (first and code in HOPELESS):
                return _exit_code(code)
            first = False
            while restarts and restarts[0] < now - WINDOW:
                restarts.popleft()
            _say(f"the server ended by itself after {now - begin:.0f} s: {_name(code)}")
            if len(restarts) == RESTARTS:
                _say(f"it is not started again: {RESTARTS} restarts in {WINDOW:.0f} s didn't help")
                return _exit_code(code)
            pause = min(FIRST_PAUSE * 2 ** len(restarts), LONGEST_PAUSE)
            restarts.append(now)
            _say(f"restart {len(restarts)} of at most {RESTARTS} in {WINDOW:.0f} s comes in {pause:g} s")
            if self._told.wait(pause):
                return _exit_code(code)

    def _run_once(self) -> int:
        """Exit code of one server (negative: the signal that ended it), once nothing of it is left."""
        # A group of its own: a terminal's Ctrl-C reaches the server's first process alone, by way of us.
        self._child = subprocess.Popen(self.command, process_group=0, preexec_fn=self._die_with_parent)
        if self._told.is_set():  # while it was started
            self._child.terminate()
        code = self._child.wait()
        self._end_orphans()
        return code

    def _die_with_parent(self) -> None:
        self._prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def _end_orphans(self) -> None:
        """Kill engine and workers of a server that died: the next one needs their memory."""
        end = time.monotonic() + 3
        while orphans := psutil.Process().children():  # those of a killed one become ours, so this comes to an end
            for orphan in orphans:
                with suppress(psutil.Error):
                    # It ends by itself when the others have, after it has removed their shared memory.
                    if time.monotonic() > end or not any("resource_tracker" in word for word in orphan.cmdline()):
                        orphan.kill()
            psutil.wait_procs(orphans, timeout=0.2)

    def _pass_on(self, number: int, _: Any) -> None:
        self._told.set()
        if self._child is not None:
            self._child.send_signal(number)


def _exit_code(code: int) -> int:
    return 128 - code if code < 0 else code


def _name(code: int) -> str:
    if code < 0:
        return signal.Signals(-code).name
    known = {entry.value: entry.name for entry in Exit}
    return f"exit code {code}" + (f" ({known[code].lower()})" if code in known else "")


def _say(text: str) -> None:
    print(f"longreach: supervisor: {text}", file=sys.stderr, flush=True)


def supervise(argv: Sequence[str]) -> int:
    """Supervise `longreach serve` with these arguments. Returns the exit code."""
    return Supervisor([sys.executable, "-m", "server.cli", "serve", *argv]).run()
