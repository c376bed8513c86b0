"""HTTP/1.1 with clients that nobody vouches for: uvicorn's protocol, with limits on headers, time and connections.

A client that sends its headers drop by drop, or none, holds a connection for `header_seconds`; one that stops reading
its answer, for `write_seconds`. Headers that are too large get 431.
"""

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from cabochon.serve.settings import ServeSettings

_LINGER = 1.0  # seconds for the rest of a body whose request was answered before it had arrived


class CarefulProtocol(HttpToolsProtocol):
    """One connection."""

    settings = ServeSettings()  # see `protocol_for`

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._received = self._header_bytes = 0
        self._in_headers = True
        self._reading: asyncio.TimerHandle | None = None  # closes when headers do not come
        self._writing: asyncio.TimerHandle | None = None  # closes when nobody reads
        self._lingering: asyncio.TimerHandle | None = None  # closes when the rest of a body does not come

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, unless there are too many."""
        super().connection_made(transport)
        # asyncio leaves it to us for sockets that were made elsewhere: a small write would wait 40 ms for the last one.
        connection = transport.get_extra_info("socket")
        if connection.family != getattr(socket, "AF_UNIX", None):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > self.settings.max_connections:
            self._refuse(503, "too many connections")
        else:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Everything ends."""
        self._disarm()
        self._resumed()
        self._cease_lingering()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request. What belongs to unfinished headers is counted: the parser keeps it."""
        if self.transport.is_closing():
            return
        if self._in_headers:
            self._received += len(data)
            if self._reading is None and (self.cycle is None or self.cycle.response_complete):
                self._arm()
        super().data_received(data)
        if max(self._header_bytes, self._received) > self.settings.max_headers:
            self._refuse(431, "the headers are too large")

    def on_url(self, url: bytes) -> None:
        """A part of the path."""
        self._header_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        self._header_bytes += len(name) + len(value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request is known."""
        self._disarm()
        self._in_headers = False  # trailers behind the body count as headers again
        large, self._header_bytes, self._received = self._header_bytes > self.settings.max_headers, 0, 0
        if large:
            self._refuse(431, "the headers are too large")
        elif not self.transport.is_closing():
            self._unset_keepalive_if_required()
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of its body."""
        if self.cycle is not None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """All of it is here; another may follow."""
        self._in_headers = True
        if self._lingering:
            # Answered before it was sent, as a request without a key is. The connection is good for another one.
            self._cease_lingering()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        if self.cycle is not None:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Answered. A body that is still on its way interests nobody: it has to end soon, or the connection does."""
        super().on_response_complete()
        if not self.pipeline and self.cycle.more_body:
            self._lingering = self.loop.call_later(_LINGER, self.transport.close)

    def pause_writing(self) -> None:
        """The client reads more slowly than it is answered."""
        super().pause_writing()
        self._writing = self.loop.call_later(self.settings.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It has caught up."""
        self._resumed()
        super().resume_writing()

    def _resumed(self) -> None:
        if self._writing:
            self._writing.cancel()
            self._writing = None

    def _cease_lingering(self) -> None:
        if self._lingering:
            self._lingering.cancel()
            self._lingering = None

    def _arm(self) -> None:
        self._reading = self.loop.call_later(self.settings.header_seconds, self._late)

    def _disarm(self) -> None:
        if self._reading:
            self._reading.cancel()
            self._reading = None

    def _late(self) -> None:
        self._reading = None
        self._refuse(408, "the request did not arrive in time")

    def _refuse(self, status: int, said: str) -> None:
        if self.transport.is_closing():
            return
        body = f'{{"error":{{"message":"{said}","type":"invalid_request_error","param":null,"code":null}}}}'.encode()
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()


def protocol_for(settings: ServeSettings) -> type[CarefulProtocol]:
    """The protocol with a server's limits: uvicorn makes one for each connection, without arguments of ours."""
    return type("CarefulProtocol", (CarefulProtocol,), {"settings": settings})
