"""Bodies in, bodies out: JSON that is read strictly, answers whole or as server-sent events, and who has gone."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import orjson
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cabochon.serve.bridge import Bridge
from cabochon.serve.errors import ApiError, api_error
from cabochon.serve.job import Job, Piece

LOG = logging.getLogger("cabochon.serve")
M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
_EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store"),
           (b"x-accel-buffering", b"no")]  # fmt: skip


class Gone(Exception):
    """Whoever asked has closed the connection."""


class JsonResponse(Response):
    """JSON by orjson."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return orjson.dumps(content)


async def read(request: Request, kind: type[M]) -> M:
    """A request's body as a model of its fields.

    Raises `ApiError`, or pydantic's error for fields that are wrong. The size was limited on the way in.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # What else a page of another server could send without asking first (CORS).
        raise ApiError(415, "the body has to be sent as application/json", code="unsupported_media_type")
    body = await request.body()
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    return kind.model_validate(content)


async def until_gone(receive: Receive) -> None:
    """Until the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What comes of some work. Ends it and raises `Gone` when the client goes away meanwhile."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        return await working
    finally:
        leaving.cancel()
        working.cancel()


@asynccontextmanager
async def watched(bridge: Bridge, job: Job, receive: Receive) -> AsyncIterator[None]:
    """While an answer is awaited: a client that goes away ends it, and so does whatever leaves this block."""

    async def watch() -> None:
        await until_gone(receive)
        job.fail(Gone())
        bridge.cancel(job)

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        bridge.cancel(job)


@dataclass
class Row:
    """One whole answer."""

    text: str = ""
    pieces: list[Piece] = field(default_factory=list)
    finish_reason: str = "length"


async def whole(bridge: Bridge, job: Job, receive: Receive) -> list[Row]:
    """The answers of a job when all of them are there."""
    rows = [Row() for _ in range(job.rows)]
    async with watched(bridge, job, receive):
        async for pieces in job:
            for piece in pieces:
                rows[piece.row].pieces.append(piece)
    for row in rows:
        row.text = "".join(piece.text for piece in row.pieces)
        row.finish_reason = row.pieces[-1].finish_reason or "length"
    return rows


class Writer(Protocol):
    """Writes an answer as events, in the shape of one API."""

    def begin(self) -> bytes:
        """Before the first token."""

    def take(self, pieces: Sequence[Piece]) -> bytes:
        """More of it."""

    def end(self) -> bytes:
        """After the last token."""

    def fail(self, error: ApiError) -> bytes:
        """Instead of the rest."""


class EventStream:
    """An answer as server-sent events. Closing the connection cancels it."""

    def __init__(self, bridge: Bridge, job: Job, writer: Writer) -> None:
        self._bridge, self._job, self._writer = bridge, job, writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it."""
        try:
            async with watched(self._bridge, self._job, receive):
                await send({"type": "http.response.start", "status": 200, "headers": _EVENTS})
                await _more(send, self._writer.begin())
                async for pieces in self._job:
                    await _more(send, self._writer.take(pieces))
                await _more(send, self._writer.end())
        except (Gone, asyncio.CancelledError):
            raise
        except Exception as error:
            failed = api_error(error)
            if failed.status == 500:
                LOG.exception("an answer broke off")
            await _more(send, self._writer.fail(failed))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _more(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


def note(request: Request, job: Job, asked: Any) -> None:
    """What the log says of a request beside its path; the prompt is left out there unless it was asked for."""
    request.scope["cabochon.log"] |= {"job": job, "prompt": asked}
