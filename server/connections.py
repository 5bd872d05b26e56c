"""uvicorn's HTTP connections, with limits for clients that send endless heads, send slowly or don't read."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.limits import Limits
from server.refusal import refusal_body, refuse


class GuardedProtocol(HttpToolsProtocol):
    """One connection.

    uvicorn itself ends connections only that are idle after an answer (5 s). vLLM's limits of heads
    (`--h11-max-...`) are for uvicorn's other parser, which isn't in use where this one is installed.
    """

    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits = limits
        self.in_head = False
        self.unparsed = 0  # bytes of a head that isn't complete; the parser keeps them to itself
        self.late: asyncio.TimerHandle | None = None
        self.unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("late")
        self._stop("unread")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.in_head:
            self.unparsed += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.in_head and self.unparsed > self.limits.header_bytes:
            self._end(431, self._too_large())
        elif self.timeout_keep_alive_task is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_request()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.in_head, self.unparsed = True, 0

    def on_headers_complete(self) -> None:
        self.in_head = False
        self._stop("late")
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.header_bytes or len(self.headers) > self.limits.header_count:
            self.app = refuse(431, self._too_large(), connection="close")
        super().on_headers_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("unread")

    def _stop(self, timer: Literal["late", "unread"]) -> None:
        if running := getattr(self, timer):
            running.cancel()
        setattr(self, timer, None)

    def _expect_request(self) -> None:
        """Start the time for a whole head; also for the rest of a body whose answer has been given."""
        self.late = self.late or self.loop.call_later(self.limits.client_seconds, self._too_late)

    def _expect_reader(self, before: int | None = None) -> None:
        """Cut off a client that has read nothing of what waits for it since the last look at it."""
        waiting = self.transport.get_write_buffer_size()
        if waiting == before:
            self.transport.abort()
        else:
            self._stop("unread")
            self.unread = self.loop.call_later(self.limits.client_seconds, self._expect_reader, waiting)

    def _too_late(self) -> None:
        if not self.transport.is_closing():
            self._end(408, f"No whole request came within {self.limits.client_seconds:g} s.")

    def _too_large(self) -> str:
        return f"The head is larger than {self.limits.header_bytes} bytes or {self.limits.header_count} fields."

    def _end(self, status: int, message: str) -> None:
        """Close, with a word to a client that has begun a request."""
        if self.in_head:
            body = refusal_body(status, message)
            reason = {408: "Request Timeout", 431: "Request Header Fields Too Large"}[status]
            head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()


def guarded(limits: Limits) -> Any:
    """What uvicorn takes for the class of its connections (`http=`)."""
    return partial(GuardedProtocol, limits=limits)
