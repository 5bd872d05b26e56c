"""Stopping without losing an accepted request: new ones are refused, those under way and queued ones finish."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.logger import init_logger

logger = init_logger("vllm.longreach.draining")  # below vLLM's, whose handlers and level it takes

RETRY_AFTER = 5
"""Seconds after which a refused client is told to try again: a load balancer has found another server by then."""
LOOKING = ("GET", "HEAD", "OPTIONS")
"""Methods that cause no work: probes, metrics and lists are answered to the end, and nobody waits for them."""


class Door:
    """Where requests come in: counts those under way, and refuses new ones once it is closed.

    Requests pass it on the event loop; vLLM stops the engine, and so waits here, in a thread of its own.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.loop = loop
        self.under_way = 0
        self.closed = False
        self.hurried = False
        self._empty = threading.Event()

    def enter(self) -> None:
        self.under_way += 1

    def leave(self) -> None:
        self.under_way -= 1
        self._look()

    def _look(self) -> None:
        if self.closed and not self.under_way:
            self._empty.set()

    def hurry(self) -> None:
        """Wait no longer."""
        self.hurried = True
        self._empty.set()

    def drain(self, seconds: float, cut: Callable[[], None]) -> bool:
        """Close, and wait until all have left; a second SIGTERM or SIGINT ends the wait.

        Args:
            seconds: to wait at most.
            cut: ends what has not finished by then.

        Returns:
            Whether every request finished.
        """
        self.closed = True
        self._look()
        if self.loop is not None:
            for number in (signal.SIGTERM, signal.SIGINT):
                self.loop.call_soon_threadsafe(self.loop.add_signal_handler, number, self.hurry)
        if self.under_way:
            logger.info("Told to stop: %d requests under way have %g s to finish.", self.under_way, seconds)
        self._empty.wait(seconds)
        if not (left := self.under_way):
            return True
        logger.warning("%d requests are cut off: %s.", left, "told to stop again" if self.hurried else "time is up")
        self._empty.clear()
        cut()
        self._empty.wait(2)  # their clients are told
        return False


class DrainingMiddleware:
    """Counts requests at the server's `Door`, and answers 503 once it is closed."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in LOOKING:
            return await self.app(scope, receive, send)
        door: Door = scope["app"].state.longreach_door
        if door.closed:
            return await refusal()(scope, receive, send)
        door.enter()
        try:
            await self.app(scope, receive, send)
        finally:
            door.leave()


def refusal() -> JSONResponse:
    """503 in OpenAI's shape. The connection ends with it, so that the next try may reach another server."""
    message = "This server is stopping and takes no new requests. Try again: another one or its successor will answer."
    body = {"message": message, "type": "ServiceUnavailableError", "param": None, "code": 503}
    headers = {"retry-after": str(RETRY_AFTER), "connection": "close"}
    return JSONResponse({"error": body}, status_code=503, headers=headers)
