"""What every request passes on its way in and out: who may come in, how large it may be, an id, a line in the log."""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import re
import sys
import time
import uuid
from collections.abc import Iterable
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cabochon.serve.errors import ApiError, api_error
from cabochon.serve.service import Service
from cabochon.serve.settings import ServeSettings
from cabochon.serve.wire import Gone

LOG = logging.getLogger("cabochon.serve")
OPEN = ("/", "/health", "/ready", "/favicon.ico")  # without a key; and whatever is below /static/
TGI_PATHS = ("/generate", "/generate_stream", "/info")  # where errors have another shape
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_SAFE = [(b"x-content-type-options", b"nosniff")]


def is_known(key: bytes, hashes: Iterable[bytes]) -> bool:
    """Whether a key is one of those. Takes the same time for every key of a length."""
    given = hashlib.sha256(key).digest()
    found = False
    for known in hashes:
        found |= hmac.compare_digest(given, known)
    return found


class Guard:
    """ASGI middleware around all routes. What goes wrong inside becomes an answer here."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service, self._settings = app, service, service.settings
        local = service.settings.host in ("127.0.0.1", "localhost", "::1")
        self._hosts = service.settings.allowed_hosts or (_LOCAL_HOSTS if local else ())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        visit = _Visit(request_id, send)
        scope["cabochon.log"] = visit.notes
        visit.notes["request_id"] = request_id
        try:
            check_access(self._settings, self._hosts, scope["path"], headers)
            limited = _Body(receive, headers, self._settings)
            await self._app(scope, limited, visit.send)
        except Gone:
            visit.status = 499  # as nginx calls it; nobody reads it
            if not visit.started:
                await visit.send({"type": "http.response.start", "status": 499, "headers": []})
                await visit.send({"type": "http.response.body", "body": b""})
        except Exception as error:
            await self._fail(visit, error, scope["path"])
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._service.metrics.requests.add(route=route, status=str(visit.status))
            if not (self._settings.socket and scope["path"] in ("/ready", "/metrics")):  # a fleet's own questions
                log_request(self._settings, visit, scope)

    async def _fail(self, visit: "_Visit", error: Exception, path: str) -> None:
        failed = api_error(error)
        if failed.status == 500:
            LOG.exception("request %s broke", visit.request_id.decode())
        if visit.started:
            raise error
        await send_error(visit.send, failed, path)


class _Visit:
    """One request's way out: it gets its id, and is timed."""

    def __init__(self, request_id: bytes, send: Send) -> None:
        self.request_id, self._send = request_id, send
        self.status, self.started, self.began = 0, False, time.perf_counter()
        self.notes: dict[str, Any] = {}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started, self.status = True, message["status"]
            message["headers"] = [*message["headers"], *_SAFE, (b"x-request-id", self.request_id)]
        await self._send(message)


class _Body:
    """A request's body on its way in, which may be neither too long nor too slow."""

    def __init__(self, receive: Receive, headers: dict[bytes, bytes], settings: ServeSettings) -> None:
        self._receive, self._left = receive, settings.max_body
        self._seconds, self._until, self._whole = settings.body_seconds, 0.0, False
        said = headers.get(b"content-length", b"0")
        if not said.isdigit() or int(said[:20]) > settings.max_body:
            raise _too_large(settings.max_body)
        self._most = settings.max_body

    async def __call__(self) -> Message:
        if self._whole:
            return await self._receive()
        loop = asyncio.get_running_loop()
        self._until = self._until or loop.time() + self._seconds
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            said = f"the body did not arrive within {self._seconds:g} seconds"
            raise ApiError(408, said, code="timeout", headers={"Connection": "close"}) from None
        if message["type"] == "http.disconnect":
            raise Gone
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise _too_large(self._most)
        self._whole = not message.get("more_body", False)
        return message


def _too_large(most: int) -> ApiError:
    # The rest of the body is not read: the connection is of no more use.
    return ApiError(413, f"the body has more than {most} bytes", code="too_large", headers={"Connection": "close"})


def check_access(settings: ServeSettings, hosts: Iterable[str], path: str, headers: dict[bytes, bytes]) -> None:
    """Raises `ApiError`: 421 for a name that is not ours, 401 without a key that is known."""
    if hosts:
        # A page of another server that gives its name our address is not let in (DNS rebinding).
        host = re.sub(r":[0-9]*$", "", headers.get(b"host", b"").decode("latin-1")).lower()
        if host not in hosts:
            raise ApiError(421, "this server does not answer under that name (--allowed-host)", code="unknown_host")
    if not settings.key_hashes or path in (*OPEN, settings.health_route) or path.startswith("/static/"):
        return
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer" or not is_known(key.strip(), settings.key_hashes):
        known = {"WWW-Authenticate": "Bearer"}
        raise ApiError(401, "an API key is needed: Authorization: Bearer KEY", code="invalid_api_key", headers=known)


async def send_error(send: Send, error: ApiError, path: str) -> None:
    """An error in the shape that the path's API uses."""
    if path in TGI_PATHS:
        kind = "overloaded" if error.status == 429 else "validation" if error.status < 500 else "generation"
        content: dict[str, Any] = {"error": error.message, "error_type": kind}
    else:
        content = error.body
    body = orjson.dumps(content)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def log_request(settings: ServeSettings, visit: _Visit, scope: Scope) -> None:
    """One line for a request: what it was and what became of it, and of what was said only its length."""
    job = visit.notes.get("job")
    line: dict[str, Any] = {
        "request": visit.request_id.decode(),
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": visit.status,
        "seconds": round(time.perf_counter() - visit.began, 4),
    }
    if job:
        line |= {"prompt_tokens": job.prompt_tokens, "generated_tokens": sum(job.tokens)}
        if job.first[0]:
            line["first_token_seconds"] = round(job.first[0] - job.created, 4)
        if settings.log_prompts:
            line["prompt"] = visit.notes["prompt"]
    write_log(settings, "request", line)


def write_log(settings: ServeSettings, event: str, line: dict[str, Any]) -> None:
    """A line on standard error: JSON for programs, or `key=value` for people."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{int(time.time() % 1 * 1000):03d}Z"
    fields = {"time": now, "event": event, **line}
    if settings.log_json:
        text = orjson.dumps(fields, default=str).decode()
    else:
        text = " ".join(str(v) if k in ("time", "event") else f"{k}={v!r}" for k, v in fields.items())
    with contextlib.suppress(OSError):  # a full disk, or nobody who reads: no reason to answer nobody
        sys.stderr.write(text + "\n")  # in one piece: several processes may write to the same place
        sys.stderr.flush()
