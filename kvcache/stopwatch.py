"""Time of work that may still be running on a GPU."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Started when made. On a GPU neither `stop` nor making it waits; `seconds` does."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._began = self._mark()
        self._ended: float | torch.cuda.Event = self._began

    def _mark(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> None:
        self._ended = self._mark()

    def seconds(self) -> float:
        """Time between start and stop; of the GPU's work where there is one."""
        if isinstance(self._began, float) or isinstance(self._ended, float):
            assert isinstance(self._began, float) and isinstance(self._ended, float)
            return self._ended - self._began
        self._ended.synchronize()
        return self._began.elapsed_time(self._ended) / 1e3
