"""One HTTP request to a server behind a Unix socket, and its answer as it comes."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import httptools

Headers = Iterable[tuple[bytes, bytes]]


class Lost(Exception):
    """The other side is not there, or was gone before the end of its answer."""


class Answer:
    """An answer whose head is here: iterate over its body."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.status, self.headers = 0, list[tuple[bytes, bytes]]()
        self._reader, self._parts, self._whole = reader, list[bytes](), False
        self._parser: Any = httptools.HttpResponseParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        """The parser's: a header."""
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The parser's: the head is whole."""
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        """The parser's: a part of the body."""
        self._parts.append(body)

    def on_message_complete(self) -> None:
        """The parser's: nothing follows."""
        self._whole = True

    async def begin(self) -> None:
        """Until the head is here."""
        while not self.status:
            await self._feed()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self._parts or not self._whole:
            if self._parts:
                part, self._parts = b"".join(self._parts), []
                yield part
            else:
                await self._feed()

    async def whole(self) -> bytes:
        """All of the body."""
        return b"".join([part async for part in self])

    async def _feed(self) -> None:
        try:
            data = await self._reader.read(2**16)
            if not data:
                raise Lost("the connection has ended")
            self._parser.feed_data(data)
        except (OSError, httptools.HttpParserError) as error:
            raise Lost(str(error)) from None


@asynccontextmanager
async def exchange(
    path: str, method: str, target: bytes, headers: Headers = (), body: bytes = b""
) -> AsyncIterator[Answer]:
    """Ask, and give the answer once its head is here. Leaving the block closes the connection.

    Raises `Lost`. `target` is a path with its query, encoded.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError as error:
        raise Lost(str(error)) from None
    try:
        fields = [*headers, (b"host", b"replica"), (b"connection", b"close"), (b"content-length", b"%d" % len(body))]
        head = b"%s %s HTTP/1.1\r\n" % (method.encode(), target)
        try:
            writer.write(head + b"".join(b"%s: %s\r\n" % field for field in fields) + b"\r\n" + body)
            await writer.drain()
        except OSError as error:
            raise Lost(str(error)) from None
        answer = Answer(reader)
        await answer.begin()
        yield answer
    finally:
        writer.close()
