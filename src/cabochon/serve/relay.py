"""What stands before several engines: every request goes to one of them, and to another if that one is lost.

Who may come in is asked here (`guard.py`), once. A request that was not answered yet goes to another replica without
anybody noticing. A stream that has begun ends with an error, as an event.
"""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, cast

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cabochon.serve.affinity import beginnings
from cabochon.serve.app import routes, surrounded
from cabochon.serve.errors import unavailable
from cabochon.serve.exchange import Headers, Lost
from cabochon.serve.fleet import Fleet
from cabochon.serve.guard import TGI_PATHS
from cabochon.serve.metrics import CONTENT_TYPE, Counter
from cabochon.serve.replica import Plan
from cabochon.serve.server import Server, run
from cabochon.serve.service import Service
from cabochon.serve.wire import JsonResponse, event, unless_gone

TRIES = 3  # replicas that a request is sent to: it may be what they were lost to
_OURS = ("/health", "/ready", "/metrics")
# Of one connection, or written anew for the other one.
_HOP = {b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"host", b"te", b"trailer", b"upgrade",
        b"expect", b"proxy-connection", b"authorization", b"date", b"x-request-id",
        b"x-content-type-options"}  # fmt: skip
_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? ")


class Reply(Protocol):
    """An answer whose head is here."""

    status: int
    headers: list[tuple[bytes, bytes]]

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Its body. Raises `Lost`."""

    async def whole(self) -> bytes:
        """All of its body. Raises `Lost`."""


class Engine(Protocol):
    """Whoever may answer."""

    number: int

    def ask(self, method: str, target: bytes, headers: Headers, body: bytes) -> AbstractAsyncContextManager[Reply]:
        """As `exchange`."""


class Engines(Protocol):
    """Whoever may answer, together; see `Fleet`."""

    moved: Counter

    def choose(self, beginnings: Sequence[bytes], without: Collection[int] = ()) -> Engine:
        """Who answers. Raises `ApiError` (503) when nobody is there."""

    def began(self, engine: Any) -> None:
        """A request is on its way."""

    def ended(self, engine: Any) -> None:
        """It is over."""

    async def figures(self) -> dict[int, str]:
        """What /metrics of each says."""


def make_relay(service: Service, fleet: Callable[[], Engines]) -> Starlette:
    """The application before a fleet, which is there once the server has started."""
    relay = Relay(fleet)
    own = {"/health": relay.health, "/ready": relay.ready, "/metrics": relay.metrics}
    passed = [Route(r.path, relay, methods=r.methods) for r in routes(service.settings) if r.path not in own]
    mine = [Route(path, endpoint, methods=["GET"]) for path, endpoint in own.items()]
    app = surrounded([*mine, *passed], service)
    app.state.service = service
    return app


class Relay:
    """ASGI endpoint of all routes."""

    def __init__(self, fleet: Callable[[], Engines]) -> None:
        self._fleet = fleet

    async def health(self, request: Request) -> Response:
        """GET /health: this process works; replicas are seen to."""
        return JsonResponse({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /ready: whether some replica takes requests on."""
        self._fleet().choose(())  # raises where there is none
        return JsonResponse({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: what is counted here, and every replica's figures with its number as a label."""
        text = together(request.app.state.service.metrics.text(), await self._fleet().figures())
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, until it is answered or nobody waits for it any more."""
        body = await _whole(receive)
        await unless_gone(receive, self._answer(scope, body, send))

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        fleet, known, lost = self._fleet(), beginnings(body) if body else [], set[int]()
        while True:
            replica = fleet.choose(known, without=lost)
            fleet.began(replica)
            try:
                return await _through(replica, scope, body, send)
            except Lost:
                lost.add(replica.number)
                if len(lost) == TRIES:
                    raise unavailable("the replicas that were to answer are lost", "no_replica", after=1) from None
                fleet.moved.add()
            finally:
                fleet.ended(replica)


async def _through(engine: Engine, scope: Scope, body: bytes, send: Send) -> None:
    """Ask a replica and pass its answer on. Raises `Lost` if it is lost while nothing has been passed on."""
    target = scope.get("raw_path", scope["path"].encode()) + (b"?" + query if (query := scope["query_string"]) else b"")
    request_id = scope["cabochon.log"]["request_id"]
    headers = [(name, value) for name, value in scope["headers"] if name not in _HOP]
    headers.append((b"x-request-id", request_id))
    async with engine.ask(scope["method"], target, headers, body) as answer:
        passed = [(name, value) for name, value in answer.headers if name not in _HOP]
        start = {"type": "http.response.start", "status": answer.status, "headers": passed}
        if any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in passed):
            await _stream(answer, start, scope["path"], send)
            return
        content = b"" if scope["method"] == "HEAD" else await answer.whole()
        passed.append((b"content-length", b"%d" % len(content)))
        await send(start)
        await send({"type": "http.response.body", "body": content})


async def _stream(answer: Reply, start: dict[str, object], path: str, send: Send) -> None:
    """Events, each as a whole. Until a token is there, nothing is passed on: the request could still go elsewhere."""
    waiting, begun = b"", False
    try:
        async for part in answer:
            waiting += part
            end = waiting.rfind(b"\n\n") + 2
            if end < 2 or not (begun or _holds_a_token(waiting[:end])):
                continue
            if not begun:
                begun = True
                await send(start)
            await send({"type": "http.response.body", "body": waiting[:end], "more_body": True})
            waiting = waiting[end:]
    except Lost:
        if not begun:
            raise
        waiting = _broken_off(path)
    if not begun:
        await send(start)
    await send({"type": "http.response.body", "body": waiting})


def _holds_a_token(events: bytes) -> bool:
    """Whether more has come than the events that begin a conversation's answers and only name its role."""
    return any(b'"role":"assistant","content":""' not in one for one in events[:-2].split(b"\n\n"))


def _broken_off(path: str) -> bytes:
    error = unavailable("the replica that was answering is lost; ask again", "replica_lost")
    if path in TGI_PATHS:
        return event({"error": error.message, "error_type": "generation"})
    return event(error.body) + b"data: [DONE]\n\n"


def together(own: str, theirs: Mapping[int, str]) -> str:
    """One exposition of several: requests as they are counted here, all else as the replicas count it, by number."""
    found = {"cabochon_requests_total": _families(own)["cabochon_requests_total"]}
    for number, text in theirs.items():
        for name, (head, samples) in _families(text).items():
            if name != "cabochon_requests_total":
                found.setdefault(name, (head, []))[1].extend(_labelled(sample, number) for sample in samples)
    found = {**_families(own), **found}
    return "".join(f"{line}\n" for head, samples in found.values() for line in (*head, *samples))


def _families(text: str) -> dict[str, tuple[list[str], list[str]]]:
    """The lines that explain a metric and its samples, by its name."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("# "):
            name = line.split(" ")[2]
        found.setdefault(name, ([], []))[not line.startswith("#")].append(line)
    return found


def _labelled(sample: str, number: int) -> str:
    return _SAMPLE.sub(lambda m: f'{m[1]}{{replica="{number}"{"," + m[2] if m[2] else ""}}} ', sample, count=1)


async def _whole(receive: Receive) -> bytes:
    """A body, whose size the guard limits."""
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


class FleetServer(Server):
    """A server that has its answers from a fleet."""

    def __init__(self, plan: Plan, address: str) -> None:
        self.plan, self.fleet = plan, cast(Fleet | None, None)
        super().__init__(None, plan.settings, address)

    def application(self) -> Starlette:
        """What passes requests on."""
        return make_relay(self.service, self._started)

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the replicas."""
        self.fleet = Fleet(self.plan, self.service.metrics, self.failed)

    @property
    def under_way(self) -> Fleet | None:
        """What has to end before the server does."""
        return self.fleet

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End, and the replicas first: whoever still waits for one is told so."""
        if self.fleet:
            await self.fleet.close()
        await super().shutdown(sockets)

    def _started(self) -> Fleet:
        if self.fleet is None:
            raise unavailable("the server is starting", "loading")
        return self.fleet


def serve_fleet(plan: Plan, started: Callable[[str], None] | None = None) -> None:
    """`serve` with several engines. Raises `Elsewhere` when they cannot start, which they say themselves."""
    run(lambda address: FleetServer(plan, address), plan.settings, started)
