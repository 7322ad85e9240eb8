"""
HTTP on one connection, with deadlines against slow peers and caps before anything is kept.

uvicorn parses (httptools) and answers; this subclass counts bytes and time. One timer a server
looks at all its connections, so that a request pays for none.
"""

from __future__ import annotations

import asyncio
from typing import Final

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from pyenclave.services.web.kit import DIRECT
from pyenclave.services.web.limits import Limits

__all__ = ["Watch", "protocol_class"]

_MAX_PIPELINE: Final = 16
_SWEEP_SECONDS: Final = 0.25


def _whole(status: str, code: str, message: str) -> bytes:
    """Return an answer to what never became a request, in the form of every other error."""
    body = f'{{"error":{{"code":"{code}","message":"{message}"}}}}'
    head = (
        f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n"
        "content-type: application/json; charset=utf-8\r\nconnection: close\r\n\r\n"
    )
    return (head + body).encode("ascii")


_TOO_LARGE: Final = _whole(
    "431 Request Header Fields Too Large",
    "RequestHeaderFieldsTooLarge",
    "the headers are too large",
)
_BODY_TOO_LARGE: Final = _whole(
    "413 Content Too Large", "RequestEntityTooLarge", "the body is too large"
)
_LATE: Final = _whole("408 Request Timeout", "RequestTimeout", "the request did not come in time")


class Watch:
    """The connections of a server and their deadlines."""

    def __init__(self, limits: Limits, connections: int) -> None:
        self.limits = limits
        self.most = connections
        # In order of arrival.
        self._open: dict[_Watched, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: _Watched) -> None:
        """Begin to watch; where there are too many, the one that wastes most time goes."""
        if len(self._open) >= self.most:
            victim = min(
                (held for held in self._open if not held.working),
                key=lambda held: held.since,
                default=None,
            )
            (victim or connection).cut()
            if victim is None:
                return
        self._open[connection] = None
        if self._timer is None:
            self._timer = connection.loop.call_later(_SWEEP_SECONDS, self._sweep, connection.loop)

    def remove(self, connection: _Watched) -> None:
        """Stop watching."""
        self._open.pop(connection, None)
        if not self._open and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for connection in [held for held in self._open if held.deadline <= now]:
            connection.late()
        if self._open:
            self._timer = loop.call_later(_SWEEP_SECONDS, self._sweep, loop)


class _Direct:
    """One request's `kit.Direct`: what `RequestResponseCycle` does, without its messages."""

    __slots__ = ("_connection", "_cycle")

    def __init__(self, connection: _Watched, cycle: RequestResponseCycle) -> None:
        self._connection = connection
        self._cycle = cycle

    def body(self) -> bytes | None:
        """Return the whole body, once; None if it is still coming."""
        cycle = self._cycle
        # Who waits for 100 Continue gets it where the body is waited for.
        if cycle.more_body or cycle.disconnected or cycle.waiting_for_100_continue:
            return None
        body = bytes(cycle.body)
        cycle.body = bytearray()
        cycle.flow.resume_reading()
        return body

    def respond(self, status: int, head: bytes, body: bytes) -> bool:
        """Write a whole answer with one call, as `RequestResponseCycle.send` does with two."""
        cycle, connection = self._cycle, self._connection
        transport = connection.transport
        if cycle.response_started or connection.flow.write_paused:
            return False
        if cycle.scope["method"] == "HEAD":
            return False
        if cycle.disconnected or transport.is_closing():
            return True
        parts = [STATUS_LINE[status]]
        for name, value in connection.server_state.default_headers:
            parts += (name, b": ", value, b"\r\n")
        parts += (head, b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n", body)
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        transport.write(b"".join(parts))
        cycle.message_event.set()
        if not cycle.keep_alive:
            transport.close()
        cycle.on_response()
        return True


class _Watched(HttpToolsProtocol):
    """A connection under a `Watch`; `protocol_class` gives it one."""

    watch: Watch

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.limits = self.watch.limits
        self.working = False  # a whole request is being answered
        self._in_header = True
        self._header_bytes = 0
        self._body_bytes = 0
        self.since = self.loop.time()
        self.deadline = self.since + self.limits.header_seconds
        self.watch.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.watch.remove(self)
        super().connection_lost(exc)

    def _cycle(self) -> RequestResponseCycle | None:
        return self.cycle

    def _begun(self) -> bool:
        """Whether an answer is on its way: nothing else may be written then."""
        cycle = self._cycle()
        return cycle is not None and not cycle.response_complete

    def cut(self) -> None:
        """End the connection now, whatever is still to be written."""
        self.transport.abort()

    def late(self) -> None:
        """End it because its time is over, and say so if nothing else was said."""
        if not self._begun() and self._header_bytes:
            self.transport.write(_LATE)
            self.transport.close()
            self.deadline = self.loop.time() + 1.0  # then without waiting for the peer
            self._header_bytes = 0
            return
        self.cut()

    def data_received(self, data: bytes) -> None:
        if self._in_header:
            self._header_bytes += len(data)
            # What a parser keeps of a header that does not end is bounded here; headers that do
            # end are measured exactly in `on_header`.
            if self._header_bytes > self.limits.header + 2 * self.limits.path + (256 << 10):
                self._refuse(_TOO_LARGE)
                return
        super().data_received(data)
        if self._in_header and self._header_bytes > self.limits.header + 2 * self.limits.path:
            self._refuse(_TOO_LARGE)

    def _refuse(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            if not self._begun():
                self.transport.write(answer)
            self.transport.close()
            self.deadline = self.loop.time() + 1.0

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_header = True
        self._measured = 0
        self._body_bytes = 0
        if len(self.pipeline) > _MAX_PIPELINE:
            self.cut()
            return
        if not self.working:
            self.since = self.loop.time()
            self.deadline = self.since + self.limits.header_seconds

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_header:
            self.cut()  # trailers: nobody here expects any
            return
        self._measured += len(name) + len(value) + 4
        if self._measured > self.limits.header:
            self._refuse(_TOO_LARGE)
            return
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_header = False
        self._header_bytes = 0
        if self.transport.is_closing():
            return
        for name, value in self.headers:
            if name == b"content-length" and (
                len(value) > 15 or not value.isdigit() or int(value) > self.limits.body
            ):
                self._refuse(_BODY_TOO_LARGE)
                return
        if not self.working:
            self.deadline = self.loop.time() + self.limits.body_seconds
        super().on_headers_complete()
        cycle = self._cycle()
        if cycle is not None and cycle.scope is self.scope:
            # The application's task has not begun yet, and will see it.
            self.scope[DIRECT] = _Direct(self, cycle)  # type: ignore[typeddict-unknown-key]

    def on_body(self, body: bytes) -> None:
        if self.transport.is_closing() or self._cycle() is None:
            return
        self._body_bytes += len(body)
        if self._body_bytes > self.limits.body:
            self._refuse(_BODY_TOO_LARGE)
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_header = True  # what comes next is a header, or nothing
        self._header_bytes = 0
        cycle = self._cycle()
        if self.transport.is_closing() or cycle is None:
            return
        if not cycle.response_complete:
            self.working = True
            # The service has its own deadline; this one is for peers that do not take the answer.
            self.deadline = self.loop.time() + self.limits.total_seconds + 5.0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self.working = bool(self.pipeline)
        self.since = self.loop.time()
        seconds = self.limits.total_seconds if self.working else self.limits.idle_seconds
        self.deadline = self.since + seconds
        super().on_response_complete()


def protocol_class(watch: Watch) -> type[HttpToolsProtocol]:
    """Return the protocol whose connections *watch* watches."""
    return type("Watched", (_Watched,), {"watch": watch})
